"""Referring expressions (RefCOCO's task): the model is asked for the box of what a phrase names.

Rows of any table: `image`, `expression` and `box` (left, top, right, bottom in pixels of the upright image). The
answer is read in the form of the model's own family, so that families can be compared; the first box counts.
"""

from typing import Any

from ...families.interface import Box
from ...grounding.metrics import box_iou
from ...grounding.questions import REFERRING
from ...processing.images import to_rgb
from ..boxes import boxes_line, read_boxes_line


def boxes_visuals(doc: dict[str, Any]) -> list:
    """The image of a row, upright and RGB."""
    return [to_rgb(doc["image"])]


def boxes_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The question, as `open-qwen2vl boxes` asks it too."""
    return REFERRING[0].format(doc["expression"].rstrip(".?!"))


def boxes_target(doc: dict[str, Any]) -> str:
    """The true box, as the report draws it."""
    return boxes_line([Box(doc["expression"], doc["box"])])


def boxes_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The IoU of the first box with the true one, 0 without any, and whether it is at least 0.5."""
    found = read_boxes_line(results[0])
    iou = box_iou([doc["box"]], [found.boxes[0].box]).item() if found and found.boxes else 0.0
    return {"accuracy": float(iou >= 0.5), "iou": iou}
