"""Boxes: read from answers, compared, drawn; and conversations about them from published annotations.

    parsing.py   an answer's text ─► Box(label, pixels of the original)      metrics.py   IoU, accuracy, mAP
    prompting.py   boxes in messages ─► what `apply_chat_template` takes
    drawing.py   boxes on an image                          crops.py     boxes in a part of the image
    conversations.py   the command `boxes`: annotations.py (COCO, RefCOCO, Visual Genome) ─► questions.py ─► json lines

How each model family writes boxes stands behind its `DocumentProcessor.boxes` (families/), and the content part that
holds them in a conversation is that of processing/box_parts.py.
"""

from ..lazy_names import lazy_names

_MODULES = {
    "Box": "..families.interface",
    "accuracy_at": ".metrics",
    "box_iou": ".metrics",
    "crop_boxes": ".crops",
    "draw_boxes": ".drawing",
    "mean_average_precision": ".metrics",
    "parse_boxes": ".parsing",
    "prompt_messages": ".prompting",
}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
