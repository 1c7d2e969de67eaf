"""The content part `box`: what it may be, and which image it is of."""

import pytest

from open_qwen2vl.processing.conversation_records import read_conversation
from open_qwen2vl.processing.sample_error import SampleError

IMAGE = {"type": "image"}


def boxes_of(*turns: list[dict], images: int = 1) -> list[dict]:
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": content} for role, content in zip(roles, turns, strict=False)]
    read = read_conversation({"messages": messages, "images": [f"{n}.png" for n in range(images)]}).messages
    return [part for message in read for part in message["content"] if part["type"] == "box"]


def box(*corners: float, **keys) -> dict:
    return {"type": "box", "box": list(corners), **keys}


def test_a_box_is_of_the_last_image_before_it_or_of_the_one_it_names():
    first, second, third = boxes_of(
        [IMAGE, box(0, 0, 1, 1, label="a"), IMAGE],
        [box(1, 2, 3, 4.5), box(0, 0, 2, 2, image=0, label="")],
        images=2,
    )
    assert first == {"type": "box", "label": "a", "box": [[0.0, 0.0, 1.0, 1.0]], "of": 0}
    assert (second["of"], second["label"], second["box"]) == (1, None, [[1.0, 2.0, 3.0, 4.5]])
    assert (third["of"], third["label"]) == (0, None)


def test_several_boxes_of_one_label_and_a_struct_of_a_table():
    """A column of structs has every key in every part."""
    part = {"type": "box", "text": None, "label": "a", "box": [[0, 0, 1, 1], [2, 2, 3, 3]], "image": None}
    text = {"type": "text", "text": "where?", "label": None, "box": None, "image": None}
    (found,) = boxes_of([IMAGE, text], [part])
    assert found["box"] == [[0, 0, 1, 1], [2, 2, 3, 3]]


@pytest.mark.parametrize(
    "part, reason",
    [
        (box(0, 0, 1), "bad_box"),
        ({"type": "box"}, "bad_box"),
        ({"type": "box", "box": []}, "bad_box"),
        ({"type": "box", "box": [[0, 0, 1, 1], 3]}, "bad_box"),
        (box(0, 0, 1, "1"), "bad_box"),
        (box(0, 0, 1, True), "bad_box"),
        (box(0, 0, 1, float("inf")), "bad_box"),
        (box(0, 0, 1, 10**400), "bad_box"),
        (box(0, 0, 1, 1, label=["a"]), "bad_box"),
        (box(0, 0, 1, 1, label="\ud800"), "bad_encoding"),
        (box(0, 0, 1, 1, image="a.png"), "bad_box"),
        (box(0, 0, 1, 1, image=1), "box_without_image"),
        (box(0, 0, 1, 1, image=-1), "box_without_image"),
        (box(3, 0, 1, 1), "empty_box"),
        (box(0, 0, 1, 1, label="a" * (1 << 21)), "text_too_large"),
    ],
)
def test_what_is_no_box_is_named(part, reason):
    with pytest.raises(SampleError) as error:
        boxes_of([IMAGE], [part])
    assert error.value.reason == reason


def test_a_box_before_every_image_is_of_none():
    with pytest.raises(SampleError) as error:
        boxes_of([box(0, 0, 1, 1), IMAGE], [{"type": "text", "text": "a"}])
    assert error.value.reason == "box_without_image"
