"""What Qwen's models write for a box, each generation in a form of its own.

    Qwen2-VL     <|object_ref_start|>red car<|object_ref_end|><|box_start|>(123,456),(789,999)<|box_end|>, in cells of
                 a thousandth of the image's side: floor(1000 * x / width), read back as the middle of the cell
    Qwen2.5-VL   [{"bbox_2d": [137, 284, 873, 622], "label": "red car"}], in pixels of the image after its resizing
    Qwen3-VL     the same in thousandths of the image's side, 0 to 1000

The two of JSON round to the nearest, so that a coordinate is off by half a cell at most in all three.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from transformers import ProcessorMixin

from ...processing.sample_error import SampleError
from ..interface import Box, BoxForm, Media
from .sizes import ImageSizes

CELLS = 1000
REF_START, REF_END, BOX_START, BOX_END = MARKS = (
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
)
_NUMBER = r"\s*(\d{1,6})\s*"
_PLACE = rf"\({_NUMBER},{_NUMBER}\)\s*,?\s*\({_NUMBER},{_NUMBER}\)"
_MARKED = re.compile(rf"{re.escape(REF_START)}(.*?){re.escape(REF_END)}|{_PLACE}", re.DOTALL)
_FIRST_OF_OBJECT = re.compile(r'\{\s*"bbox_2d"\s*:\s*(\[[^][{}]*\])')


def box_form(processor: ProcessorMixin, sizes: ImageSizes) -> BoxForm | None:
    """The form of the model that a processor is of; None for one of Qwen2-VL whose tokenizer lacks the marks."""
    names = {base.__name__ for base in type(processor).__mro__}
    if "Qwen3VLProcessor" in names:
        return JsonBoxes(None)
    if "Qwen2_5_VLProcessor" in names:
        return JsonBoxes(sizes)
    return MarkedBoxes() if processor.tokenizer.added_tokens_encoder.keys() >= set(MARKS) else None


class MarkedBoxes:
    """Qwen2-VL's form."""

    name = "marked cells"
    marks = MARKS

    def write(self, boxes: Sequence[tuple[Box, Media]]) -> list[dict[str, Any]]:
        """See [`BoxForm`]; neighbours of one label share its mark."""
        parts = []
        for label, run in groupby(boxes, lambda one: one[0].label):
            if label is not None:
                parts += [_control(REF_START), _text(label), _control(REF_END)]
            for (_, box), image in run:
                x1, y1, x2, y2 = (
                    min(max(math.floor(CELLS * at / side), 0), CELLS - 1)
                    for at, side in zip(box, (image.width, image.height) * 2, strict=True)
                )
                parts += [_control(BOX_START), _text(f"({x1},{y1}),({x2},{y2})"), _control(BOX_END)]
        return parts

    def read(self, text: str, width: int, height: int) -> list[Box]:
        """See [`BoxForm`]; where decoding left the marks out, a label is what stands before its box in the line."""
        has_marks = REF_START in text or BOX_START in text
        found: list[Box] = []
        label, end = None, 0
        for match in _MARKED.finditer(text):
            between = text[end : match.start()].replace(BOX_START, "").replace(BOX_END, "").strip(" \n,")
            end = match.end()
            if match[1] is not None:
                label = match[1]
                continue
            if between:
                label = None if has_marks else between.rpartition("\n")[2].strip()
            cells = [int(cell) for cell in match.groups()[1:]]
            if cells[0] <= cells[2] and cells[1] <= cells[3]:
                middles = (min(cell, CELLS - 1) + 0.5 for cell in cells)
                found.append(Box(label, _scaled(middles, (CELLS, CELLS), (width, height))))
        return found


class JsonBoxes:
    """The form of Qwen2.5-VL, in pixels of the resized image as `sizes` has it, and without `sizes` Qwen3-VL's."""

    marks = ()

    def __init__(self, sizes: ImageSizes | None):
        self._sizes = sizes
        self.name = "json of thousandths" if sizes is None else "json of resized pixels"

    def write(self, boxes: Sequence[tuple[Box, Media]]) -> list[dict[str, Any]]:
        """See [`BoxForm`]; one list for all."""
        objects = []
        for (label, box), image in boxes:
            cells = self._cells(image.width, image.height)
            scaled = _scaled(box, (image.width, image.height), cells)
            one = {"bbox_2d": [round(at) for at in scaled]}
            objects.append(one if label is None else {**one, "label": label})
        return [_text(json.dumps(objects, ensure_ascii=False))]

    def read(self, text: str, width: int, height: int) -> list[Box]:
        """See [`BoxForm`]; every object with a `bbox_2d` counts, wherever it stands, also one that is cut off."""
        try:
            cells = self._cells(width, height)
        except SampleError:  # an image that the model is never shown
            return []
        return [
            Box(label, _scaled(corners, cells, (width, height)))
            for corners, label in _objects(text)
            if corners[0] <= corners[2] and corners[1] <= corners[3]
        ]

    def _cells(self, width: int, height: int) -> tuple[int, int]:
        return (CELLS, CELLS) if self._sizes is None else self._sizes.resized(width, height)[::-1]


def _objects(text: str) -> Iterator[tuple[list[float], str | None]]:
    """Corners and labels of the JSON objects of a text, and of objects that end too early."""
    decoder = json.JSONDecoder()
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            found, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            cut = _FIRST_OF_OBJECT.match(text, start)
            found = {"bbox_2d": _numbers(cut[1])} if cut else {}
        corners, label = found.get("bbox_2d"), found.get("label")
        if isinstance(corners, list) and len(corners) == 4 and all(map(_is_number, corners)):
            yield [float(at) for at in corners], label if isinstance(label, str) else None


def _numbers(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9  # nan is not


def _scaled(corners: Any, of: tuple[int, int], to: tuple[int, int]) -> tuple[float, float, float, float]:
    """Corners within a width and height in another, and within it."""
    return tuple(
        min(max(at * after / before, 0.0), float(after))
        for at, before, after in zip(corners, of * 2, to * 2, strict=True)
    )


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _control(text: str) -> dict[str, Any]:
    return {"type": "control", "text": text}
