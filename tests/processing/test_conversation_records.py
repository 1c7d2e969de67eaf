"""Records of conversations: what stands beside the turns is honoured or named, and null images are none."""

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_qwen2vl.processing.conversation_records import FLAGS, SYSTEM, UNREAD, read_conversation
from open_qwen2vl.processing.sample_error import SampleError
from tests.documents import conversation_document

TURNS = [
    {"from": "human", "value": "what?"},
    {"from": "gpt", "value": "a cat"},
    {"from": "human", "value": "sure?"},
    {"from": "gpt", "value": "yes"},
]


def refused(record) -> tuple[str, str]:
    with pytest.raises(SampleError) as error:
        read_conversation(record)
    return error.value.reason, str(error.value)


def turns(**keys):
    """The turns, the first answer with these keys."""
    return [TURNS[0], {**TURNS[1], **keys}, *TURNS[2:]]


def learned(record, processor) -> str:
    ids, labels = conversation_document(read_conversation(record).messages, processor, 4)
    assert ((labels == -100) | (labels == ids)).all()
    whole = conversation_document(read_conversation({"conversations": TURNS}).messages, processor, 4)[0]
    assert (ids == whole).all()  # only the labels differ
    return processor.tokenizer.decode(labels[labels != -100])


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("flag", [0, False, 0.0])
def test_an_answer_that_is_not_to_be_learned_has_no_labels(processor, name, flag):
    assert learned({"conversations": turns(**{name: flag})}, processor) == "yes<|im_end|>\n"
    for flags in ([flag, 1], [0, flag, 0, 1]):
        assert learned({"conversations": TURNS, name: flags}, processor) == "yes<|im_end|>\n"
    both = "a cat<|im_end|>\nyes<|im_end|>\n"
    for kept in (1, True, 1.0, None):
        assert learned({"conversations": turns(**{name: kept})}, processor) == both
    # What users say is not learned anyway.
    assert learned({"conversations": [{**TURNS[0], name: flag}, *TURNS[1:]], name: [1, 1]}, processor) == both


def test_other_weights_are_named():
    for flag in (0.5, 2, "no", [0]):
        assert refused({"conversations": turns(weight=flag)})[0] == "unsupported_weight"
    assert refused({"conversations": TURNS, "loss_mask": [1, 0, 1]})[0] == "unsupported_weight"
    assert refused({"conversations": TURNS, "loss": False})[0] == "no_trained_turn"


@pytest.mark.parametrize("name", SYSTEM)
@pytest.mark.parametrize("form", ["conversations", "messages"])
def test_a_system_prompt_beside_the_turns_is_the_first_turn(name, form):
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    messages = read_conversation({form: TURNS, name: "Be brief."}).messages
    assert messages == [system, *read_conversation({form: TURNS}).messages]
    inside = [{"from": "system", "value": "Be brief."}, *TURNS]
    assert read_conversation({form: inside, name: "Be brief."}).messages == messages
    assert refused({form: inside, name: "Be long."})[0] == "ambiguous_conversation"
    for empty in ("", None):
        assert read_conversation({form: TURNS, name: empty}).messages == messages[1:]
    assert refused({form: TURNS, name: ["Be brief."]})[0] == "bad_turn"


@pytest.mark.parametrize("name", UNREAD)
def test_texts_that_no_template_shows_are_named(name):
    for record in ({"conversations": turns(**{name: "hm"})}, {"conversations": TURNS, name: "hm"}):
        reason, message = refused(record)
        assert reason == "unread_text" and name in message
    assert read_conversation({"conversations": turns(**{name: None}), name: ""})


@pytest.mark.parametrize(
    ("record", "reason", "says"),
    [
        ({"messages": []}, "no_conversation", "messages without a turn"),
        ({"conversations": None}, "no_conversation", "neither messages nor conversations"),
        ({"messages": "[]"}, "no_conversation", "messages is a str"),
        ({"messages": [{"role": "bing", "content": "x"}]}, "unknown_role", "'bing'; known are human, user"),
        ({"messages": [{"role": None, "content": "x"}]}, "bad_turn", "does not say who speaks"),
        ({"messages": [{"role": "user", "content": 42}]}, "bad_turn", "what user says is a int"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "bad_text", "NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "bad_text", "NoneType"),
        ({"messages": [{"role": "user", "function_call": {"name": "f"}}]}, "unknown_content", "calls tools"),
    ],
)
def test_one_clear_reason(record, reason, says):
    found, message = refused(record)
    assert found == reason and says in message


def test_keys_that_are_null_are_absent():
    """As rows of a table have them, whose structs have all keys of all rows."""
    record = {
        "messages": None,
        "conversations": [{**turn, "role": None, "content": None, "weight": None} for turn in TURNS],
        "images": None,
        "image": {"bytes": None, "path": None},
    }
    assert read_conversation(record) == read_conversation({"conversations": TURNS})
    assert read_conversation({"conversations": TURNS, "messages": TURNS}).messages


def with_image(image, **keys):
    return {"conversations": [{"from": "human", "value": "<image>what?"}, TURNS[1]], "image": image, **keys}


def test_what_has_neither_bytes_nor_a_path_is_no_image():
    nothing = {"bytes": None, "path": None}
    for image in (None, "", nothing, [nothing, None], []):
        assert read_conversation({"conversations": TURNS, "image": image}).images == []
        assert refused(with_image(image))[0] == "too_many_placeholders"
    assert read_conversation(with_image([nothing, "a.jpg"])).images == ["a.jpg"]
    assert read_conversation(with_image("a.jpg", images=["a.jpg"])).images == ["a.jpg"]
    assert read_conversation(with_image(nothing, images=["b.jpg"])).images == ["b.jpg"]


@pytest.mark.parametrize("key", ["image", "path", "url", "image_url"])
def test_urls_are_named_and_data_uris_read_wherever_they_stand(key):
    def record(reference):
        part = (
            {"type": "image_url", key: {"url": reference}} if key == "image_url" else {"type": "image", key: reference}
        )
        return {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a cat"}]}

    assert refused(record("https://x.org/a.jpg"))[0] == "image_is_url"
    uri = "data:image/png;base64," + base64.b64encode(b"bytes").decode()
    assert read_conversation(record(uri)).images == [{"bytes": b"bytes", "path": None}]
    assert read_conversation(record("a/b.jpg")).images == ["a/b.jpg"]
    assert refused(with_image({"path": "http://x.org/a.jpg", "bytes": None}))[0] == "image_is_url"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["user", "assistant", "<image>", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["messages", "conversations", "role", "from", "content", "value", "type", "text", "image",
                         "images", "system", "weight", "loss_mask", "bytes", "path"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(JSON)
def test_any_json_is_a_conversation_or_has_a_reason(record):
    try:
        messages, images = read_conversation(record)
    except SampleError as error:
        assert error.reason and str(error)
    else:
        assert sum(part["type"] == "image" for message in messages for part in message["content"]) == len(images)
