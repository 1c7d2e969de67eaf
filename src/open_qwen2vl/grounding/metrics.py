"""How well boxes fit the true ones: IoU, accuracy at a threshold (RefCOCO's), mean average precision (COCO's).

Boxes are `(left, top, right, bottom)` in pixels; sources: torchvision's `box_iou` and pycocotools' `COCOeval`.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import torch
from torchvision import ops

from ..families.interface import Box

Corners = Sequence[float]


def box_iou(first: Sequence[Corners], second: Sequence[Corners]) -> torch.Tensor:
    """Intersection over union of every box with every other.

    Args:
        first (`Sequence[Sequence[float]]`): `N` boxes.
        second (`Sequence[Sequence[float]]`): `M` boxes.

    Returns:
        `torch.Tensor`: float64 `(N, M)`, within 0 and 1; 0 for boxes without area.
    """
    boxes = [torch.tensor(list(map(list, some)), dtype=torch.float64).reshape(-1, 4) for some in (first, second)]
    return ops.box_iou(*boxes).nan_to_num(0.0)


def accuracy_at(truths: Sequence[Corners], answers: Sequence[Sequence[Box]], threshold: float = 0.5) -> float:
    """The share of questions whose first answered box has an IoU of at least `threshold` with the true one.

    Args:
        truths (`Sequence[Sequence[float]]`): the true box of each question.
        answers (`Sequence[Sequence[Box]]`): what [`parse_boxes`] read of each answer; none counts as wrong.
        threshold (`float`, *optional*, defaults to 0.5): RefCOCO's.

    Returns:
        `float`: within 0 and 1.

    Raises:
        ValueError: without a question, or where there are not as many answers.
    """
    if not truths or len(truths) != len(answers):
        raise ValueError(f"{len(truths)} true boxes and {len(answers)} answers")
    hits = [
        bool(answer) and box_iou([truth], [answer[0].box]).item() >= threshold
        for truth, answer in zip(truths, answers, strict=True)
    ]
    return sum(hits) / len(hits)


def mean_average_precision(truths: Sequence[Sequence[Box]], answers: Sequence[Sequence[Box]]) -> dict[str, float]:
    """COCO's mean average precision over images, with pycocotools; a label is a category.

    Answers have no scores: among those of an image and a label the earlier counts as the surer one.

    Args:
        truths (`Sequence[Sequence[Box]]`): the true boxes of each image.
        answers (`Sequence[Sequence[Box]]`): what [`parse_boxes`] read of each answer; of a label at most 100 an image.

    Returns:
        `dict[str, float]`: `map` over IoU 0.5 to 0.95, `map_50` and `map_75`, within 0 and 1.

    Raises:
        ValueError: without a true box, or where there are not as many answers as images.
        ImportError: without pycocotools: `pip install "open-qwen2vl[grounding]"`.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError('pycocotools is missing: pip install "open-qwen2vl[grounding]"') from error
    if len(truths) != len(answers) or not any(truths):
        raise ValueError(f"true boxes of {len(truths)} images and answers for {len(answers)}, or no true box at all")
    labels = sorted({box.label or "" for boxes in truths for box in boxes})
    categories = {label: number for number, label in enumerate(labels, 1)}
    true, answered = (_annotations(boxes, categories) for boxes in (truths, answers))
    if not answered:  # pycocotools cannot load nothing
        return {"map": 0.0, "map_50": 0.0, "map_75": 0.0}
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": number} for number in range(len(truths))],
        "categories": [{"id": number, "name": label} for label, number in categories.items()],
        "annotations": true,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(answered), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("map", "map_50", "map_75"), map(float, evaluation.stats), strict=False))


def _annotations(images: Sequence[Sequence[Box]], categories: dict[str, int]) -> list[dict[str, Any]]:
    """COCO's records of boxes; what has a label that no truth has can only be wrong, and is of no category there."""
    found: list[dict[str, Any]] = []
    for image, boxes in enumerate(images):
        for rank, (label, (x1, y1, x2, y2)) in enumerate(boxes):
            if (label or "") in categories:
                size = (x2 - x1, y2 - y1)
                found.append(
                    {"id": len(found) + 1, "image_id": image, "category_id": categories[label or ""],
                     "bbox": [x1, y1, *size], "area": size[0] * size[1], "iscrowd": 0, "score": 1 / (1 + rank)}
                )  # fmt: skip
    return found
