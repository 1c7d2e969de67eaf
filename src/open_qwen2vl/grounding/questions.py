"""Questions and answers about the boxes of an image, as turns of a conversation.

Which words a question has is decided by a hash of the image and the phrase: the same file gives the same questions.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from ..families.interface import Box

Turn = tuple[list[dict[str, Any]], list[dict[str, Any]]]  # parts of the question, of the answer

REFERRING = ("Locate {}.", "Where is {}?", "Find {} in the image and give its box.", "Give the box of: {}")
DETECTION = (
    "Locate every object in the image.",
    "Find all objects in the image and name them.",
    "Which objects are in the image, and where?",
)
# What stands before and behind the box.
DESCRIPTION = (("What is at ", "?"), ("Describe the region ", "."), ("Say briefly what is shown at ", "."))


def questions(task: str, key: str, boxes: Sequence[Box]) -> list[Turn]:
    """The turns of an image's boxes: one for each, or a single one for all of a detection."""
    if task == "detection":
        return [([_text(_pick(DETECTION, key))], _sorted_parts(boxes))] if boxes else []
    turns: list[Turn] = []
    for label, corners in boxes:
        box = {"type": "box", "box": list(corners)}
        if task == "referring":
            question = _pick(REFERRING, f"{key}\n{label}").format(label.rstrip(".?!"))
            turns.append(([_text(question)], [{**box, "label": label}]))
        else:
            before, behind = _pick(DESCRIPTION, f"{key}\n{label}")
            turns.append(([_text(before), box, _text(behind)], [_text(label)]))
    return turns


def _sorted_parts(boxes: Sequence[Box]) -> list[dict[str, Any]]:
    """A part for each label, by name; its boxes from top to bottom: an order that can be learned."""
    parts: dict[str, list] = {}
    for label, corners in sorted(boxes, key=lambda one: (one.label, one.box[1], one.box[0])):
        parts.setdefault(label, []).append(list(corners))
    return [{"type": "box", "label": label, "box": corners} for label, corners in parts.items()]


def _pick(choices: Sequence[Any], key: str) -> Any:
    return choices[int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % len(choices)]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
