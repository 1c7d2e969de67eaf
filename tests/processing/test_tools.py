"""Tools in conversations: read, written in both forms and read back; what stands in them is learned or not."""

import json
import unicodedata
from importlib.resources import files
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from open_qwen2vl.data.documents.forms import conversation_format
from open_qwen2vl.families import document_processor
from open_qwen2vl.families.boxes import write_boxes
from open_qwen2vl.families.interface import Media
from open_qwen2vl.processing.conversation_records import read_conversation
from open_qwen2vl.processing.conversations import ConversationFormat
from open_qwen2vl.processing.sample_error import SampleError
from open_qwen2vl.processing.tool_forms import STOPS, TOOL_FORMS, parse_calls, written_calls
from tests.qwen_vl import FAMILIES, make_processor

QWEN3 = files("trl").joinpath("chat_templates/qwen3_vl.jinja").read_text("utf8")
SIGNS = [
    "</tool_call>",
    "\n</tool_call>",
    "<tool_call>",
    "*RESULT*:",
    "\n*RESULT*:",
    "*FUNCTION*: f",
    "*ARGS*",
    "<|im_end|>",
]
letters = st.characters(exclude_categories=["Cs", "Co"], exclude_characters="\ufeff")
# Qwen's tokenizer writes NFC.
nfc = st.text(letters, max_size=8).map(lambda text: unicodedata.normalize("NFC", text))
words = st.one_of(nfc, st.sampled_from(SIGNS), st.sampled_from(["é漢😀", '"\\', "<image>"]))
numbers = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.one_of(words, st.integers(-(2**60), 2**60), numbers, st.sampled_from([None, True])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip
calls = st.tuples(st.sampled_from(["move", "look-up", "読む"]), st.dictionaries(words, values, max_size=3))
prose = st.sampled_from(["", "I go.", "two\nlines", "*bold* {"])
MOVE = {
    "type": "function",
    "function": {
        "name": "move",
        "description": "Go é.",
        "parameters": {"type": "object", "properties": {"direction": {"type": "string"}}, "required": ["direction"]},
    },
}
IMAGE, AT = {"type": "image", "image": "a.png"}, {"type": "text", "text": "where?"}


def call(name: str, arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def record(*middle: dict, **keys) -> dict:
    first = {"role": "user", "content": [IMAGE, AT]}
    return {"tools": [MOVE], "messages": [first, *middle], **keys}


def agent_record() -> dict:
    """Two calls, the results with images, an answer."""
    return record(
        {"role": "assistant", "content": "I go.", "tool_calls": [call("move", {"direction": "left"})]},
        {"role": "tool", "content": [{"type": "text", "text": "moved"}, IMAGE]},
        {"role": "assistant", "tool_calls": [call("move", '{"direction": "up"}')]},
        {"role": "tool", "content": [IMAGE, {"type": "text", "text": "<|im_end|> 2"}]},
        {"role": "assistant", "content": "done"},
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, qwen_vl_tokenizer):
    return document_processor(make_processor(request.param, qwen_vl_tokenizer))


def learned(family, record: dict, form: str = "tool_call") -> tuple[str, str]:
    """The whole text of a record's document with an image as its marks, and its learned texts with bars between."""
    messages, images, tools = read_conversation(record)
    written = conversation_format(family, form)
    blocks = [family.placeholder_ids(Media("image", 56, 56))] * len(images)
    ids, labels = written.document(written.plain(messages, tools), blocks)
    return family.tokenizer.decode(ids).replace("<|image_pad|>", ""), "|".join(spans(family.tokenizer, labels))


def spans(tokenizer, labels) -> list[str]:
    """The texts of labels that follow each other."""
    runs = (list(run) for is_learned, run in groupby(labels.tolist(), lambda label: label >= 0) if is_learned)
    return [tokenizer.decode(run) for run in runs]


def test_calls_are_learned_and_results_are_not(family):
    text, answers = learned(family, agent_record())
    first = '<tool_call>\n{"name": "move", "arguments": {"direction": "left"}}\n</tool_call>'
    second = first.replace("left", "up")
    assert answers == f"I go.\n{first}<|im_end|>\n|{second}<|im_end|>\n|done<|im_end|>\n"
    image = "<|vision_start|><|vision_end|>"
    assert f"<|im_start|>user\n<tool_response>\nmoved{image}\n</tool_response><|im_end|>\n" in text
    assert text.count(image) == 3 and text.count("<|im_end|> 2") == 1
    default = "You are a helpful assistant.\n\n" if "Qwen3" not in type(family.processor).__name__ else ""
    assert text.startswith(f"<|im_start|>system\n{default}# Tools\n") and json.dumps(MOVE, ensure_ascii=False) in text


def test_the_articles_form_is_one_turn_whose_results_are_not_learned(family):
    record = agent_record()
    if "Qwen3" in type(family.processor).__name__:  # whose template shows no image of the assistant's
        with pytest.raises(SampleError, match="loses or doubles 2 images"):
            learned(family, record, "function")
        for message in record["messages"][1:]:
            if not isinstance(message.get("content"), str | None):
                message["content"] = [part for part in message["content"] if part["type"] == "text"]
    text, answers = learned(family, record, "function")
    assert answers == (
        'I go.\n*FUNCTION*: move\n*ARGS*: {"direction": "left"}\n*RESULT*:|'
        '*FUNCTION*: move\n*ARGS*: {"direction": "up"}\n*RESULT*:|*RETURN*: done<|im_end|>\n'
    )
    assert text.count("<|im_start|>assistant") == 1 and "one of [move]\n" in text and "*RESULT*: moved" in text


def test_what_ends_without_its_result_learns_no_end_in_the_articles_form(family):
    open_call = record({"role": "assistant", "content": "", "tool_calls": [call("move", {})]})
    assert learned(family, open_call, "function")[1].endswith("*RESULT*:")
    assert learned(family, open_call)[1].endswith("</tool_call><|im_end|>\n")
    result = record(open_call["messages"][1], {"role": "tool", "content": "moved"})
    assert learned(family, result, "function")[1].endswith("*RESULT*:")


@pytest.mark.parametrize("form", TOOL_FORMS)
def test_a_call_that_is_not_to_be_learned(family, form):
    messages = [
        {"role": "assistant", "content": "*FUNCTION*: <tool_call> what?", "train": False},
        {"role": "tool", "content": "no call can be read"},
        {"role": "assistant", "content": "", "tool_calls": [call("move", {})], "weight": 0},
        {"role": "tool", "content": "missing"},
        {"role": "assistant", "content": "done"},
    ]
    text, answers = learned(family, record(*messages), form)
    assert answers == ("done<|im_end|>\n" if form == "tool_call" else "*RETURN*: done<|im_end|>\n")
    assert "no call can be read" in text and "move" in text.partition("<|im_start|>assistant")[2]


@pytest.fixture(scope="module")
def formats(qwen_vl_tokenizer) -> dict[str, ConversationFormat]:
    """Qwen3-VL's, in each form of calls."""
    documents = document_processor(make_processor("qwen3_vl", qwen_vl_tokenizer))
    return {form: conversation_format(documents, form) for form in TOOL_FORMS}


@settings(max_examples=40, deadline=None)
@given(turns=st.lists(st.tuples(prose, calls, st.lists(words, min_size=1, max_size=2)), min_size=1, max_size=3),
       system=st.sampled_from(["", "Be short."]), as_text=st.booleans(), number=st.integers(1, 2))  # fmt: skip
def test_a_conversation_with_tools_is_qwen3s_own_byte_for_byte(formats, turns, system, as_text, number):
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "go"})
    for text, (name, arguments), results in turns:
        arguments = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
        messages.append({"role": "assistant", "content": text, "tool_calls": [call(name, arguments)] * number})
        messages += [{"role": "tool", "content": [{"type": "text", "text": result}]} for result in results]
    tools = [MOVE, MOVE["function"]]
    published = render_jinja_template([messages], chat_template=QWEN3, tools=tools)[0][0]
    read, _, read_tools = read_conversation({"messages": messages, "tools": tools})
    plain = formats["tool_call"].plain(read, read_tools)
    assert render_jinja_template([plain], chat_template=QWEN3)[0][0] == published
    as_json = read_conversation({"messages": messages, "tools": json.dumps(tools, ensure_ascii=False)})
    assert as_json == (read, [], read_tools)


@settings(max_examples=40, deadline=None)
@given(turns=st.lists(st.tuples(prose, calls, words), min_size=1, max_size=3), form=st.sampled_from(TOOL_FORMS))
def test_calls_come_back_from_ids(formats, turns, form):
    """Whatever stands in arguments and results: from messages to ids, and from the learned ids back."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "go"}]}]
    for text, (name, arguments), result in turns:
        written = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        content = [{"type": "text", "text": text}] if text else []
        messages.append({"role": "assistant", "content": content, "tool_calls": [written]})
        messages.append({"role": "tool", "content": [{"type": "text", "text": result}]})
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "done"}]})
    ids, labels = formats[form].document(formats[form].plain(messages, [MOVE]), [])
    *found, last = spans(formats[form].tokenizer, labels)
    ends = [span.removesuffix("<|im_end|>\n") for span in found]
    assert [parse_calls(span, form) for span in ends] == [(text, [one]) for text, one, _ in turns]
    assert parse_calls(last.removesuffix("<|im_end|>\n"), form) == ("done", [])
    # The generation ends at the first stop: it never comes too early.
    for span in ends:
        assert span.index(STOPS[form]) + len(STOPS[form]) == len(span)


@pytest.mark.parametrize("form", TOOL_FORMS)
@pytest.mark.parametrize(
    ("arguments", "says"),
    [("{x: 1}", "Expecting property name"), ("[1]", "JSON object"), ('{"x": NaN}', "NaN is no JSON"),
     ('{"x": 1} + 1', "does not follow|delimiter"), ('{"x": __import__("os")}', "Expecting value"),
     ('{"x": "1', "Invalid control character"), ('{"x":' + "[" * 100_000, "nested too deeply")],
)  # fmt: skip
def test_what_is_no_call_says_why(form, arguments, says):
    with pytest.raises(ValueError, match=says):
        parse_calls(written_calls([{"name": "move", "arguments": arguments}], form), form)


def test_what_cannot_be_found_to_be_a_call_says_how_one_is_written():
    for form, text in (
        ("tool_call", '{"name": "f", "arguments": {}}</tool_call>'),
        ("tool_call", "these are my <tools>"),
        ("function", "*ARGS*: {}"),
        ("function", "I call *FUNCTION*: f\n*ARGS*: {}\n*RESULT*:"),
        ("function", "*RETURN*: it said *RESULT*: 1"),
    ):
        with pytest.raises(ValueError, match="it is written as"):
            parse_calls(text, form)
    with pytest.raises(ValueError, match="name of a function"):
        parse_calls('<tool_call>\n{"arguments": {}}\n</tool_call>', "tool_call")
    assert parse_calls("*RETURN*: a <b>\n", "function") == ("a <b>", [])
    two = written_calls([{"name": name, "arguments": "{}"} for name in "fg"], "tool_call")
    assert [one.name for one in parse_calls(f"I go.\n{two}", "tool_call")[1]] == ["f", "g"]


ANSWER = {"role": "assistant", "content": "done"}
CALL = {"role": "assistant", "content": None, "tool_calls": [call("move", {})]}
RESULT = {"role": "tool", "content": "moved"}


def called(*ids: str) -> dict:
    return {**CALL, "tool_calls": [{**call("move", {}), "id": one} for one in ids]}


def result(name: str, content: str = "moved") -> dict:
    return {**RESULT, "tool_call_id": name, "content": content}


BAD = [
    (record(ANSWER, tools=5), "bad_tools"),
    (record(ANSWER, tools=[{"type": "function"}]), "bad_tools"),
    (record(ANSWER, tools=[{"name": 'a"b'}]), "bad_tools"),
    (record(ANSWER, tools="[{"), "bad_tools"),
    (record(ANSWER, tools=[{"name": "f", "parameters": {"x": float("nan")}}]), "bad_tools"),
    (record(ANSWER, tools=[{"name": "f", "description": "\ud83d"}]), "bad_tools"),
    (record({**CALL, "tool_calls": [call("", {})]}), "bad_tool_calls"),
    (record({**CALL, "tool_calls": [call("f", "{")]}), "bad_tool_calls"),
    (record({**CALL, "tool_calls": [call("f", "[1]")]}), "bad_tool_calls"),
    (record({**CALL, "tool_calls": [call("f", '{"x": Infinity}')]}), "bad_tool_calls"),
    (record({**CALL, "tool_calls": ["f()"]}), "bad_tool_calls"),
    (record(called("a"), result("b"), ANSWER), "bad_tool_results"),
    (record(called("a", "b"), result("a"), result("a"), ANSWER), "bad_tool_results"),
    (record(called("a", "b"), result("a"), RESULT, ANSWER), "bad_tool_results"),
    (record(called("a", "a"), result("a"), ANSWER), "bad_tool_results"),
    (record({**RESULT, "role": "user", "tool_calls": CALL["tool_calls"]}), "bad_tool_calls"),
    (record(RESULT, ANSWER), "roles_out_of_order"),
    (record(CALL, RESULT, {"role": "user", "content": "and?"}), "roles_out_of_order"),
    (record(CALL, CALL), "roles_out_of_order"),
    (record({**CALL, "tool_calls": []}), "bad_turn"),
    (record({**CALL, "function_call": {"name": "f"}}), "unknown_content"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_tools_that_cannot_be_read_have_a_reason(bad, reason):
    with pytest.raises(SampleError) as caught:
        read_conversation(bad)
    assert caught.value.reason == reason


def test_results_come_in_the_order_of_their_calls():
    """With their images: a template shows which result is of which call by the order alone."""
    a, b = (result(name, f"<image> of {name}") for name in "ab")
    mixed = record(called("a", "b"), b, a, ANSWER, images=["b.png", "a.png"])
    ordered = record(called("a", "b"), a, b, ANSWER, images=["a.png", "b.png"])
    bare = record(
        called("a", "b"), *({**one, "tool_call_id": None} for one in (a, b)), ANSWER, images=ordered["images"]
    )
    assert read_conversation(mixed) == read_conversation(ordered) == read_conversation(bare)
    assert read_conversation(mixed).images == ["a.png", "a.png", "b.png"]


def test_what_a_form_cannot_show_has_a_reason(formats):
    def reason(form: str, *middle: dict) -> str:
        messages, _, tools = read_conversation(record(*middle))
        with pytest.raises(SampleError) as caught:
            formats[form].plain(messages, tools)
        return caught.value.reason

    assert reason("function", {**CALL, "tool_calls": CALL["tool_calls"] * 2}, RESULT) == "parallel_calls"
    assert reason("function", CALL, RESULT, RESULT) == "parallel_calls"
    assert reason("tool_call", {**ANSWER, "content": "<tool_call>"}) == "ambiguous_tools"
    assert reason("function", {**ANSWER, "content": "*RESULT*: 1"}) == "ambiguous_tools"


def test_a_template_with_calls_of_its_own_takes_no_others(qwen_vl_tokenizer):
    template = "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    messages, _, tools = read_conversation(record(CALL, RESULT))
    assert ConversationFormat(qwen_vl_tokenizer, template, {}).plain(messages, tools)
    own = ConversationFormat(qwen_vl_tokenizer, "{% if tools %}{{ tools }}{% endif %}" + template, {})
    with pytest.raises(SampleError, match="a way of its own") as caught:
        own.plain(messages, tools)
    assert caught.value.reason == "unsupported_tools"
    assert own.plain(messages[:1], []) == messages[:1]


def test_a_box_in_a_result_is_not_learned(formats, qwen_vl_tokenizer):
    """Nor is one of a call that is set aside; in the article's form all of it is one turn of the assistant."""
    box = {"type": "box", "label": "cat", "box": [1, 2, 30, 40]}
    middle = ({"role": "assistant", "content": [box], "tool_calls": CALL["tool_calls"]},
              {"role": "tool", "content": [box]}, ANSWER)  # fmt: skip
    family = document_processor(make_processor("qwen2_vl", qwen_vl_tokenizer))
    messages, _, tools = read_conversation(record(*middle))
    media = [Media("image", 56, 56)]
    written = conversation_format(family, "function")
    plain = write_boxes(written.plain(messages, tools), media, family.boxes)
    ids, labels = written.document(plain, [family.placeholder_ids(media[0])])
    assert qwen_vl_tokenizer.decode(ids).count("<|box_start|>") == 2
    first, last = spans(qwen_vl_tokenizer, labels)
    assert first.count("<|box_start|>") == 1 and "*RETURN*: done" in last and "box" not in last
