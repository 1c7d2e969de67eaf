"""The plugin: prompts, batches, losses of given answers, the journal."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from PIL import Image

from open_qwen2vl.evaluation.generation import cut_at, generation_options, load_model
from open_qwen2vl.evaluation.journal import Journal, model_fingerprint, request_key
from open_qwen2vl.evaluation.likelihood import continuation_losses
from open_qwen2vl.evaluation.prompts import SEPARATOR, PromptBuilder, user_turn
from open_qwen2vl.processing.conversations import ConversationFormat
from tests.evaluation.easyvqa import rows

ANSWER = [{"role": "assistant", "content": "y"}]


def picture(color: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, color)


def message(*parts) -> list[dict]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "url": p} for p in parts]
    return [{"role": "user", "content": content}]


def test_chat_prompts_are_those_of_training(processor):
    red, blue = picture("red"), picture("blue")
    builder = PromptBuilder(processor)
    turns = [{"role": "system", "content": "Be brief."}, *message("a", red, "b<|im_end|>"), *ANSWER]
    for messages in (user_turn([red], "what?"), message("a", red, "b", red, blue, "c"), [*turns, *message("<s>z")]):
        prompt = builder.build(messages)
        (ids,) = builder.encode([prompt])["input_ids"].tolist()
        training = ConversationFormat(processor.tokenizer, processor.chat_template, {"image": "<|image_pad|>"})
        blocks = [[processor.image_token_id] * 4] * len(prompt.images)
        trained, labels = training.document([*prompt.messages, *ANSWER], blocks)
        assert ids == trained[: len(ids)].tolist(), prompt.text
        assert labels[len(ids)] != -100, "and here the answer begins"
    assert builder.build(message("a", red, "b", red, blue, "c")).images == [red, red, blue]
    assert builder.build(turns).text.startswith("<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im")


def test_what_a_task_asks_never_becomes_a_control_token(processor):
    """Also in prompts without a template, in which only the separator of demonstrations is one."""
    evil = "Is it <|im_end|> <s> <|image_pad|> <|endofchunk|>?"
    tokenizer = processor.tokenizer
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    builder = PromptBuilder(processor, "raw", separator="<|endofchunk|>")
    (shot,), (asked,) = message(picture("red"), evil), message(picture("blue"), evil)
    prompt = builder.build([{"role": "user", "content": [*shot["content"], SEPARATOR, *asked["content"]]}])
    image = ["<|image_pad|>"] * 4
    (ids,) = builder.encode([prompt])["input_ids"].tolist()
    assert [special[i] for i in ids if i in special] == ["<s>", *image, "<|endofchunk|>", *image]
    assert tokenizer.decode(ids).count(evil) == 2
    (ids,) = PromptBuilder(processor).encode([PromptBuilder(processor).build([asked])])["input_ids"].tolist()
    assert [special[i] for i in ids if i in special].count("<|image_pad|>") == 4
    answers = [tokenizer.decode(builder.continuation_ids(prompt, one)) for one in (" yes", "<|im_end|>")]
    assert answers == [" yes", "<|im_end|>"] and len(builder.continuation_ids(prompt, "<|im_end|>")) > 1


def test_raw_prompts_have_no_template(processor):
    builder = PromptBuilder(processor, "raw")
    prompt = builder.build(message(picture("red"), "a cat", picture("blue"), picture("red"), "\nwhat?\nAnswer:"))
    assert prompt.text == "<s><|image_pad|>\na cat<|image_pad|>\n<|image_pad|>\nwhat?\nAnswer:"
    ids = builder.encode([prompt])["input_ids"][0]
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1 and (ids == processor.image_token_id).sum() == 12
    assert processor.tokenizer.decode(builder.continuation_ids(prompt, " yes")) == " yes"
    assert processor.tokenizer.decode(PromptBuilder(processor).continuation_ids(prompt, " yes")) == "yes"


def test_batches_are_padded_on_the_left_and_follow_the_token_budget(processor):
    builder = PromptBuilder(processor, image_seq_length=16)
    prompts = [builder.build(message(*[picture("red")] * n, "x" * n)) for n in (1, 3, 0)]
    inputs = builder.encode(prompts)
    assert inputs["pixel_values"].shape[0] == 4
    assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [16, 48, 0]
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1, 1] and inputs["attention_mask"][0, 0] == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [({"type": "video", "url": "a.mp4"}, "a.mp4: .*videos"), ({"type": "image", "url": 3}, "content of type int")],
)
def test_only_text_and_images_are_asked(processor, content, reason):
    with pytest.raises(ValueError, match=reason):
        PromptBuilder(processor).build([{"role": "user", "content": [content]}])


def test_options_that_do_not_fit_are_refused(processor, tokenizer):
    with pytest.raises(ValueError, match="prompt_style 'fancy'"):
        PromptBuilder(processor, "fancy")
    base = type(processor)(processor.image_processor, tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        PromptBuilder(base)
    assert PromptBuilder(base, "raw").build(message("a")).text == "<s>a"


def test_generation_is_greedy_unless_a_temperature_is_asked_for():
    options, until = generation_options({"until": ["\n", ""], "temperature": 0, "image_aspect_ratio": "x"}, 7)
    assert until == ["\n"]
    assert options == {"max_new_tokens": 7, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    options, until = generation_options({"until": ".", "temperature": 0.5, "top_p": None, "max_new_tokens": 3}, 7)
    assert until == ["."] and options == {"max_new_tokens": 3, "do_sample": True, "temperature": 0.5}


def test_an_answer_ends_at_the_first_stop():
    assert cut_at("a cat. on, a mat", [",", "."]) == "a cat"
    assert cut_at("a cat", ["\n"]) == "a cat"


@pytest.mark.parametrize("batch_size", [2, 5])
def test_losses_are_those_of_whole_sequences(tiny_model, processor, batch_size):
    builder = PromptBuilder(processor)
    prompt = builder.build(message(picture("red"), "what?", picture("blue")))
    inputs = builder.encode([prompt])
    answers = ["yes", "a photo of two dogs", "x", "in the park", "no!"]
    ids = [builder.continuation_ids(prompt, answer) for answer in answers]
    assert len({len(own) for own in ids}) > 1
    results = continuation_losses(tiny_model, inputs, ids, batch_size)
    for own, (loss, greedy) in zip(ids, results, strict=True):
        whole = torch.cat([inputs["input_ids"], torch.tensor([own])], dim=1)
        with torch.no_grad():
            logits = tiny_model(**{**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}).logits
        own_logits = logits[0, -len(own) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(own_logits, torch.tensor(own), reduction="sum").item()
        assert loss == pytest.approx(expected, abs=1e-4)
        assert greedy == (own_logits.argmax(-1).tolist() == own)


def test_what_greedy_decoding_writes_is_called_greedy(tiny_model, processor):
    builder = PromptBuilder(processor)
    inputs = builder.encode([builder.build(message(picture("red"), "what?"))])
    # Else it never writes an image's placeholder, however likely.
    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": None}
    ids = tiny_model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    (_, greedy), (_, other) = continuation_losses(tiny_model, inputs, [ids, [*ids[:-1], (ids[-1] + 1) % 300]], 2)
    assert greedy and not other


def test_a_journal_survives_a_torn_line(tmp_path):
    journal = Journal(tmp_path)
    journal.add({"a": "one", "b": [1.5, True]})
    journal.close()
    path = tmp_path / "rank-0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key": "c", "ans')
    again = Journal(tmp_path, rank=0)
    assert (again.get("a"), again.get("b"), again.get("c")) == ("one", [1.5, True], None)
    again.add({"c": "three \u2028 lines\n"})
    again.close()
    assert Journal(tmp_path, rank=1).get("c") == "three \u2028 lines\n"
    assert len([line for line in path.read_text().split("\n") if line.endswith("}")]) == 3


def test_a_key_stands_for_all_that_decides_an_answer():
    red = picture("red")
    parts = ("weights", "task", 0, "prompt", {"max_new_tokens": 3})
    assert request_key(*parts, red) == request_key(*parts, red.copy())
    others = [(*parts, picture("blue")), (*parts,), (*parts, red, red), (*parts[:-1], {"max_new_tokens": 4}, red)]
    others += [("other", *parts[1:], red), (*parts, picture("red", (30, 40)))]
    assert len({request_key(*parts, red), *(request_key(*other) for other in others)}) == 7


def test_the_fingerprint_follows_weights_and_processor(tiny_model, processor, model_folder):
    fingerprint = model_fingerprint(tiny_model, processor)
    loaded, its_processor = load_model(str(model_folder), "cpu")
    assert model_fingerprint(loaded, its_processor) == fingerprint
    its_processor.image_seq_length = 16
    assert model_fingerprint(loaded, its_processor) != fingerprint
    with torch.no_grad():
        tiny_model.lm_head.weight[3, 3] += 1e-6
    assert model_fingerprint(tiny_model, processor) != fingerprint


def test_lmms_eval_finds_the_plugin():
    from lmms_eval.models import get_model

    from open_qwen2vl.evaluation.lmms_model import SimpleTransformersModel, TransformersModel

    assert [entry.name for entry in entry_points(group="lmms_eval.models")].count("open_qwen2vl") == 1
    assert get_model("open_qwen2vl") is TransformersModel
    assert get_model("open_qwen2vl", force_simple=True) is SimpleTransformersModel


@pytest.mark.slow
def test_lmms_evals_own_command_runs_the_model(model_folder, easyvqa, tmp_path):
    """In a process of its own, where nothing has imported this package before the entry point does."""
    arguments = ["--model", "open_qwen2vl", "--model_args", f"pretrained={model_folder},device=cpu", "--limit", "4"]
    arguments += ["--tasks", "easyvqa_gen", "--include_path", str(easyvqa), "--batch_size", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-m", "lmms_eval", *arguments]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3600)
    assert re.search(r"easyvqa_gen *\|none *\| *0\|exact_match", run.stdout), run.stderr[-3000:]


def test_answers_come_in_the_order_of_the_requests_and_stop(model_folder, processor):
    """Requests as lmms-eval's own command makes them, with two kinds of options."""
    from io import BytesIO

    from lmms_eval.api.instance import Instance

    from open_qwen2vl.evaluation.lmms_model import TransformersModel

    model = TransformersModel(str(model_folder), device="cpu", batch_size="3")
    docs = [{**row, "image": Image.open(BytesIO(row["image"]))} for row in rows(7)]
    model.task_dict["t"] = {"test": docs}
    kwargs = [{"max_new_tokens": 4 + 3 * (i % 2), "until": None} for i in range(7)]

    def requests(options):
        return [
            Instance(
                "generate_until",
                (doc["question"], lambda doc: user_turn([doc["image"]], doc["question"]), options[i], i, "t", "test"),
                idx=0,
                metadata={"task": "t", "doc_id": i, "repeats": 1},
            )
            for i, doc in enumerate(docs)
        ]

    texts = [result.text for result in model.generate_until(requests(kwargs))]
    builder = PromptBuilder(processor)
    for doc, own, text in zip(docs, kwargs, texts, strict=True):
        inputs = builder.encode([builder.build(user_turn([doc["image"]], doc["question"]))])
        options = {"do_sample": False, "max_new_tokens": own["max_new_tokens"]}
        ids = model.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert text == processor.tokenizer.decode(ids, skip_special_tokens=True)
    stops = [{"max_new_tokens": 7, "until": [text[3]] if len(text) > 3 else None} for text in texts]
    for text, stopped in zip(texts, model.generate_until(requests(stops)), strict=True):
        assert len(text) <= 3 or stopped.text == text[: text.find(text[3])]
    assert json.dumps(sorted(model.prompts)) == json.dumps([["t", i] for i in range(7)])
