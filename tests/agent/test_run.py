"""The loop of an agent: what it shows a model, what it does with what that writes, and what is left to train on."""

import json
from typing import Literal

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl import PackedDataset, agent
from open_qwen2vl.agent.functions import Functions, content, mismatch
from open_qwen2vl.data import plan_packs
from open_qwen2vl.processing.tool_forms import TOOL_FORMS, written_calls


class World:
    """A line of cells, of which only that is seen where one stands."""

    def __init__(self):
        self.at = 0

    def move(self, direction: Literal["left", "right"], far: int = 1) -> str:
        """Move along the line.

        Args:
            direction: Where to.
            far: How many cells.
        """
        if self.at + far > 3:
            raise agent.ToolError("a wall")
        self.at += far if direction == "right" else -far
        return f"you are at {self.at}"

    def observe(self) -> list:
        return ["you see", Image.new("RGB", (60 + 10 * self.at, 60), (80 * self.at, 0, 0))]


def write(form: str, arguments: str = '{"direction": "right"}', name: str = "move") -> str:
    return written_calls([{"name": name, "arguments": arguments}], form)


def script(*texts: str):
    """An actor that writes these texts one after the other, whatever it is shown."""
    texts = iter(texts)
    return lambda messages: next(texts)


def run(model, world: World, max_steps: int = 8, **options) -> agent.Transcript:
    return agent.run(model, [world.move], world.observe, max_steps, task="go right", **options)


def test_the_observation_may_say_the_task():
    transcript = agent.run(script("there"), [World().move], lambda: "go right", 1)
    assert [texts(message) for message in transcript.messages] == ["go right", "there"]


def texts(message: dict) -> str:
    return "".join(part.get("text", "*") for part in message["content"])


@pytest.mark.parametrize("form", TOOL_FORMS)
def test_a_run_is_observations_calls_and_results_until_an_answer(form):
    world = World()
    behind = " 7\n*RETURN*: I made this up" if form == "function" else ""
    done = "*RETURN*: there" if form == "function" else "there"
    model = script("Go.\n" + write(form) + behind, write(form, '{"direction": "right", "far": 2}'), done)
    transcript = run(model, world, tool_form=form, system="Be quick.")
    assert (world.at, transcript.steps, transcript.answer, transcript.ended) == (3, 3, "there", "answer")
    assert [message["role"] for message in transcript.messages] == [
        "system", "user", "assistant", "tool", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert [texts(message) for message in transcript.messages] == [
        "Be quick.", "you see*go right", "Go.", "you are at 1you see*", "", "you are at 3you see*", "there",
    ]  # fmt: skip
    call = {"name": "move", "arguments": {"direction": "right", "far": 2}}
    assert transcript.messages[4]["tool_calls"] == [{"type": "function", "function": call}]
    assert not transcript.errors and not any("train" in message for message in transcript.messages)
    assert transcript.tools[0]["function"]["parameters"]["properties"]["direction"]["enum"] == ["left", "right"]


@pytest.mark.parametrize("form", TOOL_FORMS)
@pytest.mark.parametrize(
    ("arguments", "name", "reason", "says"),
    [
        ("{direction: right}", "move", "unreadable_call", "Expecting property name"),
        ('{"direction": "right"}', "os.system", "unknown_function", "no function 'os.system'; there are move"),
        ('{"direction": "up"}', "move", "bad_arguments", "direction is 'up', none of 'left', 'right'"),
        ('{"direction": "right", "far": "2"}', "move", "bad_arguments", "far is a str, not integer"),
        ('{"direction": "right", "far": true}', "move", "bad_arguments", "far is a bool, not integer"),
        ("{}", "move", "bad_arguments", "missing a required argument"),
        ('{"direction": "right", "x": 1}', "move", "bad_arguments", "unexpected keyword argument 'x'"),
        ('{"direction": "right", "far": 9}', "move", "tool_error", "error: a wall"),
    ],
)
def test_a_call_that_cannot_be_made_tells_the_model_why(form, arguments, name, reason, says):
    world = World()
    transcript = run(script(write(form, arguments, name), write(form), "there"), world, tool_form=form)
    assert (world.at, transcript.errors, transcript.ended) == (1, {reason: 1}, "answer")
    assert says in texts(transcript.messages[2])
    trained = [message.get("train", True) for message in transcript.messages if message["role"] == "assistant"]
    assert trained == [False, True, True]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("tool_call", write("tool_call", '{"direction": "right", "far": 1e999}')),
        ("tool_call", write("tool_call", '{"direction": "\\ud800"}')),
        ("tool_call", write("tool_call", name='mo\\"ve')),
        ("tool_call", write("tool_call", name=" ")),
        ("tool_call", "among <tools>\n" + write("tool_call")),
        ("function", write("function", name='mo"ve')),
        ("function", "so *RESULT*: is\n" + write("function")),
    ],
)
def test_what_could_not_be_shown_again_is_no_call(qwen_vl_folder, monkeypatch, tmp_path, form, text):
    """A model reads its own calls in the next step: none may break the conversation, or its training."""
    said = iter([text, "done"])
    folder = qwen_vl_folder("qwen2_vl")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

    def generate(input_ids, **others):
        new = processor.tokenizer(next(said), add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    transcript = run(model, World(), processor=processor, tool_form=form)
    assert (dict(transcript.errors), transcript.answer) == ({"unreadable_call": 1}, "done")
    agent.save_transcripts([transcript], tmp_path / "saved")


def test_calls_at_once_are_made_in_order():
    world = World()
    transcript = run(script("\n".join([write("tool_call")] * 2), "there"), world)
    assert world.at == 2
    assert [texts(m) for m in transcript.messages if m["role"] == "tool"] == ["you are at 1", "you are at 2you see*"]


def test_a_run_ends_after_max_steps_and_with_an_error_of_the_users_own():
    world = World()
    transcript = run(lambda messages: write("tool_call", '{"direction": "left"}'), world, max_steps=3)
    assert (world.at, transcript.steps, transcript.ended, transcript.answer) == (-3, 3, "max_steps", None)
    assert texts(transcript.messages[-1]) == "you are at -3"

    def broken() -> str:
        """Fail."""
        return {}["x"]

    with pytest.raises(KeyError):
        agent.run(script(write("tool_call", "{}", "broken")), [broken], lambda: None, 2, task="go")


def test_mistakes_are_named():
    def bare(x):
        return x

    for tools, says in (([bare], "type hint|docstring"), ([World().move, World().move], "same name")):
        with pytest.raises(ValueError, match=says):
            Functions(tools)
    with pytest.raises(ValueError, match="max_steps"):
        run(script(), World(), max_steps=0)
    with pytest.raises(ValueError, match="tool_form"):
        run(script(), World(), tool_form="hermes")
    with pytest.raises(ValueError, match="no text, image or JSON"):
        content(object())
    with pytest.raises(ValueError, match="needs its processor"):
        run(torch.nn.Linear(1, 1), World())
    assert content({"é": [1, None]}) == [{"type": "text", "text": '{"é": [1, null]}'}] and content(None) == []


@pytest.mark.parametrize(
    ("value", "schema", "wrong"),
    [
        (None, {"type": "string", "nullable": True}, ""),
        (None, {"type": "string"}, "x is a NoneType, not string"),
        (1, {"type": ["integer", "string"]}, ""),
        (1, {"type": "number"}, ""),
        (1.5, {"type": "integer"}, "x is a float, not integer"),
        (True, {"enum": [1, 2]}, "x is True, none of 1, 2"),
        ([1, "a"], {"type": "array", "items": {"type": "integer"}}, "x[1] is a str, not integer"),
        ([1], {"type": "array", "prefixItems": [{"type": "integer"}] * 2}, "x has 1 items, not 2"),
        ({"a": "b"}, {"type": "object", "additionalProperties": {"type": "integer"}}, "x['a'] is a str, not integer"),
        ("a", {"anyOf": [{"type": "integer"}, {"type": "array"}]}, "x is a str, not integer"),
        ([1], {"anyOf": [{"type": "integer"}, {"type": "array"}]}, ""),
        ("anything", {}, ""),
    ],
)
def test_arguments_are_what_their_schema_says(value, schema, wrong):
    assert mismatch(value, schema, "x") == wrong


class Scripted:
    """Stands for `generate`: writes texts token by token until one of the stopping criteria says so."""

    def __init__(self, tokenizer, *texts: str):
        self.tokenizer, self.texts, self.prompts = tokenizer, iter(texts), []

    def __call__(self, input_ids, stopping_criteria, max_new_tokens, **inputs):
        self.prompts.append(input_ids[0].tolist())
        for token in self.tokenizer(next(self.texts))["input_ids"]:
            input_ids = torch.cat([input_ids, torch.tensor([[token]])], 1)
            if any(bool(criterion(input_ids, None).all()) for criterion in stopping_criteria):
                break
        return input_ids


@pytest.mark.parametrize(
    ("family", "form"), [("qwen2_vl", "tool_call"), ("qwen2_vl", "function"), ("qwen3_vl", "tool_call")]
)
def test_a_model_reads_what_it_is_trained_on_and_its_transcript_is_trained_on(
    qwen_vl_folder, tmp_path, monkeypatch, family, form
):
    folder = qwen_vl_folder(family)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    wrong = write(form, "{}")
    done = "*RETURN*: there" if form == "function" else "there"
    written = Scripted(processor.tokenizer, write(form) + "\nmade up", wrong + " made up", done)
    monkeypatch.setattr(model, "generate", written)
    transcript = run(model, World(), processor=processor, tool_form=form)
    assert (transcript.answer, transcript.errors) == ("there", {"bad_arguments": 1})
    agent.save_transcripts([transcript], tmp_path / "transcripts")
    with pytest.raises(ValueError, match="exists"):
        agent.save_transcripts([transcript], tmp_path / "transcripts")
    lines = tmp_path / "transcripts/transcripts.jsonl"
    report = plan_packs([lines], tmp_path / "packs", processor, images=[tmp_path / "transcripts"], max_length=2048,
                        num_workers=1, tool_form=form)  # fmt: skip
    assert (report.documents, report.skipped, report.images) == (1, {}, 3)
    item = PackedDataset(tmp_path / "packs", processor)[0]
    ids, labels = item["input_ids"].tolist(), item["labels"]
    for prompt in written.prompts:
        assert ids[: len(prompt)] == prompt
    answers = processor.tokenizer.decode(labels[labels >= 0])
    assert "made up" not in answers and wrong not in answers and answers.endswith(f"{done}<|im_end|>\n")
    seen = json.loads(lines.read_text())["messages"][0]["content"][1]["image"]
    assert Image.open(tmp_path / "transcripts" / seen).size == (60, 60)
    # Nothing moved by the call that was not made: the third observation is the second.
    assert len(list((tmp_path / "transcripts/images").iterdir())) == 2


def test_a_folder_acts_and_its_context_is_bounded(qwen_vl_folder, monkeypatch):
    world, folder = World(), qwen_vl_folder("qwen2_vl")
    transcript = run(folder, world, max_steps=2, max_new_tokens=4)
    assert transcript.steps in (1, 2)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model.config.get_text_config().max_position_embeddings = 500
    monkeypatch.setattr(
        model, "generate", Scripted(processor.tokenizer, *[write("tool_call", '{"direction": "left"}')] * 99)
    )
    transcript = run(model, world, max_steps=99, processor=processor, max_new_tokens=16)
    assert transcript.ended == "context_full" and 1 <= transcript.steps < 20


def test_qwen3_shows_no_images_within_an_answer(qwen_vl_folder, monkeypatch):
    folder = qwen_vl_folder("qwen3_vl")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    monkeypatch.setattr(model, "generate", Scripted(processor.tokenizer, write("function")))
    with pytest.raises(ValueError, match="cannot show"):
        run(model, World(), tool_form="function", processor=processor)
