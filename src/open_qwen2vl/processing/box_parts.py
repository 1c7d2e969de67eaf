"""The content part that names places in an image, in pixels of the image as it is, upright.

{"type": "box", "label": "red car", "box": [x1, y1, x2, y2]}    of the last image before it in the conversation
{"type": "box", "box": [[...], [...]], "image": 0}              several of one label, of the first image

In the normal form `box` is a list of boxes and the number of the image is `of`: a chat template would take `image`
for an image.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .sample_error import SampleError


def read_box(part: Mapping) -> dict[str, Any]:
    """The normal form of a part; `bad_box`, or `empty_box` where the second corner is not right of and below."""
    label, given, image = part.get("label"), part.get("box"), part.get("image")
    if not isinstance(label, str | None):
        raise SampleError("bad_box", f"the label of a box is a {type(label).__name__}")
    if not _is_index(image):
        raise SampleError("bad_box", f"the image of a box is {image!r}, no number of an image")
    if not isinstance(given, list | tuple) or not given:
        raise SampleError("bad_box", f"a box is a {type(given).__name__}, no list of four numbers")
    boxes = [_corners(box) for box in (given if isinstance(given[0], list | tuple) else [given])]
    return {"type": "box", "label": label or None, "box": boxes, "of": image}


def _is_index(image: Any) -> bool:
    return image is None or isinstance(image, int) and not isinstance(image, bool)


def _corners(box: Any) -> list[float]:
    is_box = isinstance(box, list | tuple) and len(box) == 4
    if not is_box or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in box):
        raise SampleError("bad_box", "a box is no list of four numbers")
    try:
        x1, y1, x2, y2 = corners = [float(x) for x in box]
    except OverflowError as error:
        raise SampleError("bad_box", f"a box beyond all images: {error}") from error
    if not all(map(math.isfinite, corners)):
        raise SampleError("bad_box", f"a box of {corners}")
    if x2 <= x1 or y2 <= y1:
        raise SampleError("empty_box", f"a box of {corners}, which holds nothing")
    return corners


def place_boxes(messages: Iterable[Mapping[str, Any]]) -> None:
    """Give each box of messages in the normal form the number of its image; `box_without_image` if it has none."""
    parts = [part for message in messages for part in message["content"]]
    images, seen = sum(part["type"] == "image" for part in parts), 0
    for part in parts:
        seen += part["type"] == "image"
        if part["type"] == "box":
            number = seen - 1 if part["of"] is None else part["of"]
            if not 0 <= number < images:
                raise SampleError("box_without_image", f"a box of image {number} in a conversation of {images}")
            part["of"] = number
