"""Which samples the page shows, and what of them: those on which models disagree first, then a draw of the rest.

Samples of several models are matched by task and `sample_id`. Texts are read for all samples, images only for those
that are shown, and an image that several samples share is kept once.
"""

import base64
import hashlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..boxes import draw_answers
from .folders import Evaluation, sample_scores

LONGEST_TEXT = 4000  # characters; what a model says without an end would fill the page
# First bytes of the formats that browsers show; anything else is left out.
IMAGE_TYPES = ((b"\xff\xd8\xff", "jpeg"), (b"\x89PNG\r\n", "png"), (b"RIFF", "webp"))

Key = tuple[str, int]  # sample_id and, where a file has it several times (as for seeds), the number of its occurrence


class TaskSamples(NamedTuple):
    """What is shown of a task."""

    task: str
    total: int  # samples that any model has
    disagreements: int  # those that two models did not score alike
    samples: list[dict[str, Any]]  # the chosen ones, as the page's script reads them


class PromptFrame(NamedTuple):
    """What all prompts of a task begin and end with: the chat template, and what the task asks every time."""

    lines_before: int  # lines that all prompts begin with
    lines_after: int  # lines that all end with
    mark: str  # what the line before those ends with in all prompts, as the template's end of a turn

    @classmethod
    def of(cls, prompts: Sequence[str | None]) -> "PromptFrame":
        """The frame of one model's prompts on one task, an empty one if they are all alike."""
        split = list({tuple((prompt or "").split("\n")) for prompt in prompts})
        if len(split) < 2:
            return cls(0, 0, "")
        before = len(os.path.commonprefix(split))
        after = len(os.path.commonprefix([lines[before:][::-1] for lines in split]))
        ends = [lines[len(lines) - after - 1][::-1] for lines in split if len(lines) > before + after]
        _, mark, rest = os.path.commonprefix(ends)[::-1].partition("<")
        return cls(before, after, mark + rest)

    def inner(self, prompt: str) -> str:
        """What is particular to a prompt."""
        lines = prompt.split("\n")
        return "\n".join(lines[self.lines_before : len(lines) - self.lines_after]).removesuffix(self.mark).strip()


class ImageStore:
    """Images of the page, each once."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self._numbers: dict[bytes, int] = {}

    def add(self, data: bytes) -> int | None:
        """Number of an image file, `None` if it is of no known format."""
        kind = next((kind for start, kind in IMAGE_TYPES if data.startswith(start)), None)
        if kind is None:
            return None
        number = self._numbers.setdefault(hashlib.sha256(data).digest(), len(self.urls))
        if number == len(self.urls):
            self.urls.append(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")
        return number


def choose_samples(evaluations: Sequence[Evaluation], most: int, images: ImageStore) -> list[TaskSamples]:
    """At most `most` samples of every task, in the order of the results; their images go to `images`."""
    tasks = dict.fromkeys(task for evaluation in evaluations for task in evaluation.results["tasks"])
    return [_choose(evaluations, task, most, images) for task in tasks]


def _choose(evaluations: Sequence[Evaluation], task: str, most: int, images: ImageStore) -> TaskSamples:
    tables = [
        evaluation.read_samples(task) if task in evaluation.results["tasks"] else None for evaluation in evaluations
    ]
    places = [_places(table) for table in tables]
    scores = [None if table is None else sample_scores(table) for table in tables]
    keys = list(dict.fromkeys(key for place in places for key in place))
    disputed = {key for key in keys if _disagree(key, places, scores)}
    chosen = sorted(keys, key=lambda key: (key not in disputed, _draw(key), str(key)))[:most]
    records = {
        key: [_record(table, place.get(key)) for table, place in zip(tables, places, strict=True)] for key in chosen
    }
    pictures = _images(evaluations, task, places, records, images)
    frames = [PromptFrame.of([] if table is None else table["prompt"].to_pylist()) for table in tables]
    samples = [_sample(records[key], frames, pictures[key]) for key in chosen]
    return TaskSamples(task, len(keys), len(disputed), samples)


def _places(table: pa.Table | None) -> dict[Key, int]:
    """Row of each sample."""
    seen: Counter[str] = Counter()
    places: dict[Key, int] = {}
    for row, name in enumerate([] if table is None else table["sample_id"].to_pylist()):
        places[name, seen[name]] = row
        seen[name] += 1
    return places


def _disagree(key: Key, places: list[dict[Key, int]], scores: list[np.ndarray | None]) -> bool:
    found = {float(own[place[key]]) for place, own in zip(places, scores, strict=True) if key in place}
    return len({score for score in found if not np.isnan(score)}) > 1


def _draw(key: Key) -> bytes:
    """A place in an order that is like a random one and always the same."""
    return hashlib.sha256(f"{key[0]}\n{key[1]}".encode(errors="replace")).digest()


def _images(
    evaluations: Sequence[Evaluation],
    task: str,
    places: list[dict[Key, int]],
    records: dict[Key, list[dict[str, Any] | None]],
    images: ImageStore,
) -> dict[Key, list[int]]:
    """Numbers of the images of each chosen sample, from the first model that has it, with the boxes of all."""
    numbers: dict[Key, list[int]] = {}
    for evaluation, place in zip(evaluations, places, strict=True):
        rows = {key: place[key] for key in records if key in place and key not in numbers}
        found = evaluation.read_images(task, rows.values())
        for key, row in rows.items():
            files = found.get(row, [])
            if files:
                answers = {other.label: own for other, own in zip(evaluations, records[key], strict=True) if own}
                files[-1] = draw_answers(files[-1], answers)
            known = [images.add(data) for data in files]
            numbers[key] = [number for number in known if number is not None]
    return numbers


def _record(table: pa.Table | None, row: int | None) -> dict[str, Any] | None:
    return None if table is None or row is None else table.slice(row, 1).to_pylist()[0]


def _sample(records: list[dict[str, Any] | None], frames: list[PromptFrame], images: list[int]) -> dict[str, Any]:
    """A sample as the page's script reads it; a model's own prompt is kept where it differs from the first's."""
    first, frame = next((record, frame) for record, frame in zip(records, frames, strict=True) if record)
    prompt = first["prompt"] or ""
    return {
        "id": _clip(first["sample_id"]),
        "category": first["category"],
        # Files of older versions have no question: then what the prompts of a task do not have in common.
        "question": _clip(frame.inner(prompt) if first.get("question") is None else first["question"]),
        "prompt": _clip(prompt),
        "answer": _clip(first["answer"]),
        "images": images,
        "models": [record and _outcome(record, prompt) for record in records],
    }


def _outcome(record: dict[str, Any], prompt: str) -> dict[str, Any]:
    score = record["score"]
    outcome = {
        "prediction": _clip(record["prediction"]),
        "score": score if score is not None and math.isfinite(score) else None,
    }
    if record["response"] != record["prediction"]:
        outcome["response"] = _clip(record["response"])
    if (record["prompt"] or "") != prompt:
        outcome["prompt"] = _clip(record["prompt"])
    return outcome


def _clip(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + f" … ({len(text):,} characters)"
