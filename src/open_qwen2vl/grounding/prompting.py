"""Boxes in what a model is asked, and in what it has answered before: the same tokens as in training.

`apply_chat_template` knows no boxes, and its `sanitize_control_tokens` makes text of every control token that stands
in a message's dict. Here boxes are written as the model's family has them, their marks as [`ControlPart`], which is
no dict and stays as it is.
"""

from collections import UserDict
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from ..families import document_processor
from ..families.boxes import write_boxes
from ..families.interface import BoxForm, Media
from ..processing.box_parts import place_boxes, read_box


class ControlPart(UserDict):
    """A content part of type `text` that is control tokens of the model's own."""


def prompt_messages(messages: list[dict[str, Any]], processor: ProcessorMixin) -> list[dict[str, Any]]:
    """Messages for `apply_chat_template`, with boxes as the processor's family writes them.

    Args:
        messages (`list[dict]`): `{"role", "content"}` of text or parts; images are upright `PIL.Image.Image` in
            `{"type": "image", "image": image}`, boxes `{"type": "box", "label"?, "box", "image"?}` in pixels of the
            last image before them, or of that whose number `"image"` is.
        processor (`ProcessorMixin`): the model's.

    Returns:
        `list[dict]`: the same messages where there is no box.

    Raises:
        SampleError: for a box that is none, is out of its image or has none, and a family without a form for boxes.
        ValueError: for images that are not opened, whose sizes nobody knows.
    """
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    if not any(part["type"] == "box" for content in contents for part in content):
        return messages
    turns = [{**message, "content": _read(message["content"])} for message in messages]
    place_boxes(turns)
    images = [part.get("image") for turn in turns for part in turn["content"] if part["type"] == "image"]
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(f"messages with boxes have opened images (PIL.Image.Image), not {type(image).__name__}")
    turns = write_boxes(turns, [Media("image", *image.size) for image in images], box_form(processor))
    return [{**turn, "content": [_shown(part) for part in turn["content"]]} for turn in turns]


def box_form(processor: ProcessorMixin) -> BoxForm | None:
    """How the family of a processor writes boxes; None where it knows none, and for a processor of no known family."""
    try:
        return document_processor(processor).boxes
    except ValueError:
        return None


def answer_parts(ids: Iterable[int], processor: ProcessorMixin) -> list[Mapping[str, Any]]:
    """What a model has generated as content parts of its turn, in which the marks around boxes stay control tokens."""
    form, tokenizer = box_form(processor), processor.tokenizer
    marks = set(tokenizer.convert_tokens_to_ids(list(form.marks))) if form else set()
    parts = []
    for is_mark, run in groupby(ids, marks.__contains__):
        text = tokenizer.decode(list(run), skip_special_tokens=not is_mark)
        if text:
            parts.append((ControlPart if is_mark else dict)(type="text", text=text))
    return parts or [{"type": "text", "text": ""}]


def _read(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [read_box(part) if part["type"] == "box" else part for part in content]


def _shown(part: dict[str, Any]) -> Mapping[str, Any]:
    return ControlPart(type="text", text=part["text"]) if part["type"] == "control" else part
