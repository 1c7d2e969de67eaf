"""Boxes between a conversation, in pixels of its images, and what a family writes and reads in their place."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ..processing.sample_error import SampleError
from .interface import Box, BoxForm, Media

SLACK = 1.0  # pixels that a box may stand out of its image, as those of annotations do; they are cut off


def write_boxes(messages: list[dict[str, Any]], media: Sequence[Media], form: BoxForm | None) -> list[dict[str, Any]]:
    """Messages in the normal form with each box as its family writes it.

    Raises:
        SampleError: `boxes_unsupported`, or `box_outside` for a box more than `SLACK` pixels out of its image.
    """
    if not any(part["type"] == "box" for message in messages for part in message["content"]):
        return messages
    if form is None:
        raise SampleError("boxes_unsupported", "the model family, or its tokenizer, has no form for boxes")
    images = [one for one in media if one.kind == "image"]
    written = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for (is_box, learned), run in groupby(message["content"], _kind):
            parts = list(run)
            if is_box:
                parts = form.write([one for part in parts for one in _placed(part, images)])
                parts = parts if learned else [{**part, "train": False} for part in parts]
            content += parts
        written.append({**message, "content": content})
    return written


def _kind(part: dict[str, Any]) -> tuple[bool, bool]:
    return part["type"] == "box", part.get("train", True)


def _placed(part: dict[str, Any], images: list[Media]) -> list[tuple[Box, Media]]:
    image = images[part["of"]]
    for x1, y1, x2, y2 in part["box"]:
        if min(x1, y1) < -SLACK or x2 > image.width + SLACK or y2 > image.height + SLACK:
            raise SampleError(
                "box_outside", f"a box of {[x1, y1, x2, y2]} in an image of {image.width}x{image.height} pixels"
            )
    return [(Box(part["label"], tuple(box)), image) for box in part["box"]]
