"""Boxes where an image is cropped."""

from collections.abc import Iterable

from ..families.interface import Box


def crop_boxes(boxes: Iterable[Box], window: tuple[float, float, float, float]) -> list[Box]:
    """Bring boxes to a part of their image: those that lie in it by half of their area or more, cut at its edges.

    Args:
        boxes (`Iterable[Box]`): in pixels of the image, each with an area.
        window (`tuple[float, float, float, float]`): left, top, right and bottom of the part, in pixels of the image.

    Returns:
        `list[Box]`: in pixels of the part, in the same order, without those of which less than half is left.
    """
    left, top, right, bottom = window
    kept = []
    for label, (x1, y1, x2, y2) in boxes:
        cut = (max(x1, left), max(y1, top), min(x2, right), min(y2, bottom))
        width, height = max(cut[2] - cut[0], 0.0), max(cut[3] - cut[1], 0.0)
        if width * height >= (x2 - x1) * (y2 - y1) / 2 > 0:
            kept.append(Box(label, (cut[0] - left, cut[1] - top, cut[2] - left, cut[3] - top)))
    return kept
