"""Caption documents: their ids on the real Qwen2.5 vocabulary, their labels, and text that stays text."""

import json
from pathlib import Path

import pytest

from open_qwen2vl.processing.text_formats import (
    encode_as_text,
    original_conversation_document,
    prepare_tokenizer,
    tokenizer_fingerprint,
)
from tests.documents import caption_document, interleaved_document, split_texts, tokenize_texts

ASSETS = Path(__file__).parents[1] / "assets" / "original"
GOLDEN = json.loads((ASSETS / "captions.json").read_text("utf8"))
INTERLEAVED = json.loads((ASSETS / "interleaved.json").read_text("utf8"))
CONVERSATIONS = json.loads((ASSETS / "conversations.json").read_text("utf8"))


def expand(ids: list[int], image: int = 151655) -> list[int]:
    """The original's ids with 144 placeholders in place of its -200."""
    return [token for i in ids for token in ([image] * 144 if i == -200 else [i])]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["caption"])
def test_ids_of_the_original(qwen_tokenizer, case):
    input_ids, labels = caption_document(case["caption"], qwen_tokenizer, 144)
    expected = expand(case["input_ids"])
    assert input_ids.tolist() == expected
    assert labels.tolist() == [-100] * 145 + expected[145:]
    assert split_texts([None, case["caption"]], qwen_tokenizer, 144, 4096) == [(0, 2, len(input_ids))]
    assert len(input_ids) == case["length"]


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
    nothing, ids = tokenize_texts(tokenizer, [None, text])
    assert nothing == []
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == "\n" + text


def test_fingerprint_follows_what_decides_ids(tokenizer, qwen_tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(qwen_tokenizer) != before


def test_no_captions(tokenizer):
    assert encode_as_text(tokenizer, []) == []


@pytest.mark.parametrize("name", INTERLEAVED)
def test_interleaved_ids_of_the_original(qwen_tokenizer, name):
    case = INTERLEAVED[name]
    input_ids, labels = interleaved_document(case["texts"], qwen_tokenizer, 144)
    assert input_ids.tolist() == expand(case["input_ids"])
    assert len(input_ids) == case["length"]
    assert labels.tolist() == [-100, *expand(case["input_ids"], -100)[1:]]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_mended_conversation_ids_of_the_original(qwen_tokenizer, name):
    case = CONVERSATIONS[name]
    input_ids, labels = original_conversation_document(case["conversation"], qwen_tokenizer, 144)
    assert input_ids.tolist() == expand(case["ids_if_nothing_were_dropped"])
    # What was dropped stood in a user turn, so that the labelled tokens are the same.
    assert labels[labels != -100].tolist() == [label for label in case["labels"] if label != -100]
    assert (labels == input_ids)[labels != -100].all()


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name != "image_in_the_middle"])
def test_conversation_ids_that_released_weights_saw(qwen_tokenizer, name):
    case = CONVERSATIONS[name]
    input_ids, labels = original_conversation_document(case["conversation"], qwen_tokenizer, 144, drop_newline=True)
    assert input_ids.tolist() == expand(case["input_ids"])
    positions = [token for i, label in zip(case["input_ids"], case["labels"], strict=True)
                 for token in [label] * (144 if i == -200 else 1)]  # fmt: skip
    assert labels.tolist() == positions


def test_special_tokens_in_a_conversation_stay_text(qwen_tokenizer):
    turns = [{"from": "human", "value": "<|im_end|>"}, {"from": "gpt", "value": "<|im_start|><s>"}]
    input_ids, _ = original_conversation_document(turns, qwen_tokenizer, 4)
    assert (input_ids == 151645).sum() == 3 and (input_ids == 151644).sum() == 2 and (input_ids == 128245).sum() == 1


def test_unknown_speaker_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="turn from 'system'"):
        original_conversation_document([{"from": "system", "value": "a"}], tokenizer, 4)
