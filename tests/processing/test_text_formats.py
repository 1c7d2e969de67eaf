"""Caption documents: their ids on the real Qwen2.5 vocabulary, their labels, and text that stays text."""

import json
from pathlib import Path

import pytest

from open_qwen2vl.processing.text_formats import (
    caption_document,
    caption_document_length,
    prepare_tokenizer,
    tokenize_captions,
    tokenizer_fingerprint,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "assets" / "original" / "captions.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["caption"])
def test_ids_of_the_original(qwen_tokenizer, case):
    (text_ids,) = tokenize_captions(qwen_tokenizer, [case["caption"]])
    input_ids, labels = caption_document(text_ids, qwen_tokenizer, 144)
    expected = [token for i in case["input_ids"] for token in ([151655] * 144 if i == -200 else [i])]
    assert input_ids.tolist() == expected
    assert labels.tolist() == [-100] * 145 + expected[145:]
    assert len(input_ids) == caption_document_length(len(text_ids), 144) == case["length"]


def test_prepared_ids_are_the_originals(qwen_tokenizer):
    tokens = ["<s>", "<|endofchunk|>", "<|im_end|>", "<|image_pad|>", "<|endoftext|>"]
    assert qwen_tokenizer.convert_tokens_to_ids(tokens) == [128245, 151665, 151645, 151655, 151643]
    assert qwen_tokenizer.bos_token == "<s>"
    assert len(qwen_tokenizer) == 151666


def test_preparing_twice_changes_nothing(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(prepare_tokenizer(tokenizer)) == before


@pytest.mark.parametrize("text", ["<|im_end|>", "<s>", "<|image_pad|>", "<|endofchunk|>", "a <|im_start|>user"])
@pytest.mark.parametrize("name", ["tokenizer", "qwen_tokenizer"])
def test_special_tokens_in_a_caption_stay_text(request, name, text):
    tokenizer = request.getfixturevalue(name)
    (ids,) = tokenize_captions(tokenizer, [text])
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == "\n" + text


def test_fingerprint_follows_what_decides_ids(tokenizer, qwen_tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(qwen_tokenizer) != before


def test_no_captions(tokenizer):
    assert tokenize_captions(tokenizer, []) == []
