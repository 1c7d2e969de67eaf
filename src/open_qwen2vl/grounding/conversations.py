"""The step `boxes`: conversations about boxes from published annotations.

annotations.py ─► regions of an image ── size of its file, clipped ─► boxes ── questions.py ─► FILE.jsonl

Boxes are brought to the size of the image's file where that is a copy of another size, and left out with their reason
where its shape is another one. What stands out of the image is cut off, and dropped if less than half is left.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ..data.storage.image_files import ImageFiles, describe_images
from ..data.storage.image_sizes import upright_size
from ..families.boxes import SLACK
from ..families.interface import Box
from ..files import renamed_when_whole
from ..processing.sample_error import SampleError
from .annotations import Annotated, Region, read_annotations
from .crops import crop_boxes
from .options import BoxesOptions
from .questions import questions

logger = logging.getLogger(__name__)

MAX_STRETCH = 0.01  # by which a copy's aspect may differ from that of the annotated image


class BoxesReport(NamedTuple):
    """What was written, changed and left out."""

    output: str
    conversations: int
    questions: int
    changed: Counter[str]  # clipped boxes, resized images
    skipped: Counter[str]  # regions, or images, by reason

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.conversations:,} conversations with {self.questions:,} questions"]
        for what, counts in (("changed", self.changed), ("left out", self.skipped)):
            if counts:
                lines.append(f"{what}: " + ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())))
        return "\n".join(lines)


def write_conversations(options: BoxesOptions) -> BoxesReport:
    """Make the conversations of a source and write them; what cannot be used is counted by reason.

    Raises:
        ValueError: for a source that is none, a task that it does not offer, or if no question can be asked.
        OSError: if a file cannot be read or written.
    """
    step, output = _Step(options), Path(options.output)
    count = asked = 0
    with renamed_when_whole(output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for record in tqdm(step.conversations(), desc="boxes", unit=" conversations"):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count, asked = count + 1, asked + len(record["messages"]) // 2
        if not count:
            raise ValueError(f"{options.source}: no question can be asked of it: {dict(+step.skipped)}")
    return BoxesReport(options.output, count, asked, +step.changed, +step.skipped)


class _Step:
    def __init__(self, options: BoxesOptions):
        self.changed: Counter = Counter()
        self.skipped: Counter = Counter()
        self._options = options
        self._files = ImageFiles(Path(), describe_images([Path(one).absolute() for one in options.images], Path()))
        kind, self._images = read_annotations(options.source, options.split, self.skipped)
        if options.task == "detection" and kind != "coco":
            raise ValueError(f"--task detection: {options.source} does not have all objects of an image, as COCO has")

    def conversations(self) -> Iterator[dict[str, Any]]:
        """One or more of each image."""
        for image in self._images:
            try:
                name, boxes = self._boxes(image)
            except SampleError as error:
                self._skip(error, image.key)
                continue
            turns = questions(self._options.task, image.key, boxes)
            for start in range(0, len(turns), self._options.max_turns):
                yield _record(image.key, name, turns[start : start + self._options.max_turns])

    def _boxes(self, image: Annotated) -> tuple[str, list[Box]]:
        """The image's name and its boxes in pixels of the file."""
        name, size = self._find(image)
        width, height = image.size
        if abs(size[0] * height - size[1] * width) > MAX_STRETCH * size[0] * height:
            raise SampleError("other_shape", f"{name} is {size[0]}x{size[1]}, its boxes are of {width}x{height}")
        self.changed["resized_images"] += size != (width, height)
        regions = list(dict.fromkeys(image.regions))
        self.skipped["duplicate"] += len(image.regions) - len(regions)
        named = Counter(region.phrase.strip() for region in regions)
        boxes = []
        for region in regions:
            try:
                boxes.append(self._box(region, named, (size[0] / width, size[1] / height), size))
            except SampleError as error:
                self._skip(error, image.key)
        return name, boxes

    def _find(self, image: Annotated) -> tuple[str, tuple[int, int]]:
        """The image's path in its folder, and its size; the folders may begin anywhere in the published path."""
        tried = [path[start:] for path in (Path(name).parts for name in image.names) for start in range(len(path))]
        for parts in tried:
            name = "/".join(parts)
            try:
                location = self._files.find(name)
            except SampleError as error:
                if error.reason != "missing_image":
                    raise
                continue
            return name, upright_size(lambda limit: self._files.read(name, location, limit))  # noqa: B023
        raise SampleError("missing_image", f"there is no image {' or '.join(image.names)}")

    def _box(self, region: Region, named: Counter, scale: tuple[float, float], size: tuple[int, int]) -> Box:
        phrase, box = region.phrase.strip(), region.box
        if region.is_crowd:
            raise SampleError("crowd", f"{phrase}: a box of many")
        if not phrase or not phrase.isprintable():
            raise SampleError("bad_phrase", f"a region is described by {phrase!r}")
        if self._options.task == "referring" and named[phrase] > 1:
            raise SampleError("ambiguous_phrase", f"{phrase!r} is said of {named[phrase]} regions")
        if not all(map(math.isfinite, box)) or box[2] <= box[0] or box[3] <= box[1]:
            raise SampleError("empty_box", f"{phrase!r} has the box {box}")
        scaled = Box(phrase, tuple(at * by for at, by in zip(box, scale * 2, strict=True)))
        kept = crop_boxes([scaled], (0.0, 0.0, *map(float, size)))
        if not kept:
            raise SampleError("box_outside", f"{phrase!r} is at {box} of an image of {size[0]}x{size[1]} pixels")
        self.changed["clipped_boxes"] += any(abs(a - b) > SLACK for a, b in zip(kept[0].box, scaled.box, strict=True))
        x1, y1, x2, y2 = rounded = tuple(round(at, 2) for at in kept[0].box)
        if x2 <= x1 or y2 <= y1:  # pack would leave the whole conversation out
            raise SampleError("empty_box", f"{phrase!r} has the box {box}")
        return Box(phrase, rounded)

    def _skip(self, error: SampleError, key: str) -> None:
        if error.reason not in self.skipped:
            logger.warning("image %s: %s (%s); others are counted", key, error.reason, error)
        self.skipped[error.reason] += 1


def _record(key: str, image: str, turns: list) -> dict[str, Any]:
    messages = []
    for number, (question, answer) in enumerate(turns):
        parts = question if number else [{"type": "image"}, *question]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"id": key, "images": [image], "messages": messages}
