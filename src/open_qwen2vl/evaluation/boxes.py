"""Boxes of answers in one form for every task and for the report, whatever the model's family writes.

A task whose `generation_kwargs` have `boxes: true` gets the model's answer with a line behind it:

    boxes in 640x480 pixels: [{"box": [10.0, 20.0, 30.0, 40.0], "label": "red car"}]

The pixels are those of the last image of the prompt; the true boxes, for whose sake lmms-eval opens no image, stand in
a line without its size. Only json reads it; nothing of a model is evaluated.
"""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..families.interface import Box
from ..grounding.drawing import draw_boxes
from ..processing.images import decode_image
from ..processing.sample_error import SampleError

_LINE = re.compile(r"^boxes in (?:(\d{1,6})x(\d{1,6}) )?pixels: (\[.*\])$", re.MULTILINE)
TRUE_COLOR = "#1a9850"
MOST_DRAWN = 100  # of an answer
ANSWER_COLORS = ("#d73027", "#4575b4", "#e08214", "#762a83")


class BoxesLine(NamedTuple):
    """What a line says."""

    boxes: list[Box]
    size: tuple[int, int] | None  # width and height of the image in pixels


def boxes_line(boxes: Sequence[Box], size: tuple[int, int] | None = None) -> str:
    """The line of some boxes, in an image of so many pixels."""
    listed = [{"box": [round(float(at), 2) for at in box], "label": label} for label, box in boxes]
    return f"boxes in {f'{size[0]}x{size[1]} ' if size else ''}pixels: {json.dumps(listed, ensure_ascii=False)}"


def read_boxes_line(text: str) -> BoxesLine | None:
    """The last such line of a text, or None; entries that are no boxes are left out."""
    lines = _LINE.findall(text)
    if not lines:
        return None
    width, height, listed = lines[-1]
    try:
        entries = json.loads(listed)
    except (ValueError, RecursionError):
        return None
    boxes = []
    for entry in entries:
        box, label = (entry.get("box"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        if _is_box(box):
            boxes.append(Box(label if isinstance(label, str) else None, tuple(map(float, box))))
    return BoxesLine(boxes, (int(width), int(height)) if width else None)


def _is_box(box: object) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(
        isinstance(at, int | float) and not isinstance(at, bool) and abs(at) < 1e9 and math.isfinite(at) for at in box
    ) and box[0] <= box[2] and box[1] <= box[3]  # fmt: skip


def draw_answers(image: bytes, samples: Mapping[str, Mapping[str, Any]]) -> bytes:
    """An image file with the true boxes (green) and each model's; as it is where the truth is no box, or no image.

    Args:
        image (`bytes`): a JPEG, PNG or WebP, perhaps smaller than the image that the model saw.
        samples (`Mapping`): of each model by its name, `answer` (the truth) and `response`.

    Returns:
        `bytes`: a JPEG.
    """
    true = read_boxes_line(next(iter(samples.values()))["answer"] or "")
    answers = {name: read_boxes_line(sample["response"] or "") for name, sample in samples.items()}
    size = next((found.size for found in answers.values() if found and found.size), None)
    if true is None or not true.boxes or size is None:
        return image
    try:
        drawn = decode_image(image)
    except SampleError:  # shown, or not, as any other
        return image
    drawn = draw_boxes(drawn, _fitted("truth", true.boxes, size, drawn.size), TRUE_COLOR)
    for number, (name, found) in enumerate(answers.items()):
        boxes = _fitted(name, found.boxes, found.size or size, drawn.size) if found else []
        drawn = draw_boxes(drawn, boxes, ANSWER_COLORS[number % len(ANSWER_COLORS)])
    buffer = io.BytesIO()
    drawn.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _fitted(name: str, boxes: list[Box], size: tuple[int, int], shown: tuple[int, int]) -> list[Box]:
    """Boxes on a smaller copy of their image, each with the name of who says so."""
    across, down = (after / max(before, 1) for before, after in zip(size, shown, strict=True))
    return [Box(name, (x1 * across, y1 * down, x2 * across, y2 * down)) for _, (x1, y1, x2, y2) in boxes[:MOST_DRAWN]]
