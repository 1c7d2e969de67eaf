"""Our chat templates render as the published ones and mark what the assistant says."""

from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from open_qwen2vl.families.qwen_vl import processing
from open_qwen2vl.families.qwen_vl.processing import training_template
from tests.qwen_vl import FAMILIES, make_processor

texts = st.text(st.sampled_from("ab \n<>|{}%\"'é漢😀"), max_size=12)
image = st.fixed_dictionaries({"type": st.just("image")})
text = st.fixed_dictionaries({"type": st.just("text"), "text": texts})
odd = st.sampled_from(
    [{"type": "video"}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "image", "image": "y"}]
)
parts = st.lists(st.one_of(image, text, odd), max_size=4)
content = st.one_of(texts, parts)
turn = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": content})
conversations = st.lists(turn, min_size=1, max_size=6)


def render(template: str, messages: list[dict], **options) -> tuple[str, list]:
    """The text, and where in it the answers are: none in a template without marks."""
    rendered, answers = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask="endgeneration" in template, **options
    )
    return rendered[0], answers[0] if answers else []


@pytest.fixture(scope="module", params=FAMILIES)
def templates(request, qwen_vl_tokenizer) -> tuple[str, str]:
    """The published template of a family and ours."""
    processor = make_processor(request.param, qwen_vl_tokenizer)
    return processor.chat_template, training_template(processor)


@settings(max_examples=60, deadline=None)
@given(messages=conversations, prompt=st.booleans(), numbered=st.booleans())
def test_a_conversation_renders_as_published(templates, messages, prompt, numbered):
    published, ours = templates
    options = {"add_generation_prompt": prompt, "add_vision_id": numbered}
    assert render(ours, messages, **options)[0] == render(published, messages, **options)[0]


@pytest.mark.parametrize("tools", [None, [{"name": "f", "parameters": {"x": "é"}}, {"name": "g"}]])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": [{"type": "text", "text": "Be short."}]}]])
def test_tools_of_qwen3_render_as_published(tools, system):
    published = files("trl").joinpath("chat_templates/qwen3_vl.jinja").read_text("utf8")
    ours = (files(processing.__package__) / "chat_template_qwen3.jinja").read_text("utf8")
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        *system,
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call, {"name": "g", "arguments": '{"y": 2}'}]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": [{"type": "image"}, {"type": "text", "text": "2"}]},
        {"role": "assistant", "content": "done", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    assert render(ours, messages, tools=tools)[0] == render(published, messages, tools=tools)[0]


def test_only_what_the_assistant_says_is_marked(templates):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "first"}]},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "second"},
    ]
    rendered, answers = render(templates[1], messages)
    assert [rendered[start:stop] for start, stop in answers] == ["first<|im_end|>\n", "second<|im_end|>\n"]


def test_a_template_that_is_not_qwens_is_refused_or_taken_with_its_own_marks(qwen_vl_tokenizer):
    processor = make_processor("qwen2_vl", qwen_vl_tokenizer)
    own = processor.chat_template
    processor.chat_template = own.replace("You are a helpful assistant.", "You are something else.")
    with pytest.raises(ValueError, match="generation"):
        training_template(processor)
    processor.chat_template = "{% generation %}{{ messages }}{% endgeneration %}"
    assert training_template(processor) == processor.chat_template
    processor.chat_template = None
    assert (
        render(training_template(processor), [{"role": "user", "content": "q"}])[0]
        == (render(own, [{"role": "user", "content": "q"}])[0])
    )
