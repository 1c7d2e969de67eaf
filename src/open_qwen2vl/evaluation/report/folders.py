"""Reading what evaluations left: `results.json` and `samples/TASK.parquet` of each folder.

Files may come from other people: everything in them is text to be shown, nothing is trusted or executed.
"""

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...places import Place, arrow_source, place

FORMAT_VERSION = 1
TEXT_COLUMNS = ("sample_id", "category", "prompt", "answer", "prediction", "response")
LATER_COLUMNS = ("question",)  # not in all files
LARGEST_IMAGE = 2**21  # bytes; evaluate writes thumbnails


class Evaluation(NamedTuple):
    """One folder."""

    label: str  # the model's name, with the folder where two have the same name
    folder: Place
    results: dict[str, Any]  # content of `results.json`, with numbers that are no finite ones as None

    def read_samples(self, task: str) -> pa.Table | None:
        """Samples of a task without their images, in the order of the file; `None` where the folder has none."""
        path = self._samples_path(task)
        if path is None:
            return None
        with _parquet(path) as file:
            missing = [name for name in (*TEXT_COLUMNS, "score", "images") if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(f"{path}: has no column {', '.join(missing)}")
            columns = [name for name in (*TEXT_COLUMNS, "score", *LATER_COLUMNS) if name in file.schema_arrow.names]
            table = file.read(columns=columns)
            for number, name in enumerate(columns):
                kind = pa.float64() if name == "score" else pa.string()
                table = table.set_column(number, name, table.column(name).cast(kind))
            table.validate(full=True)
            return table

    def read_images(self, task: str, rows: Iterable[int]) -> dict[int, list[bytes]]:
        """Content of the image files of some rows of a task; the others' stay on the disk."""
        wanted, images, start = set(rows), {}, 0
        path = self._samples_path(task)
        if path is None or not wanted:
            return images
        with _parquet(path) as file:
            for batch in file.iter_batches(batch_size=256, columns=["images"]):
                column = batch.column("images")
                for row in sorted(wanted.intersection(range(start, start + len(batch)))):
                    images[row] = list(_image_files(column[row - start].as_py()))
                start += len(batch)
        return images

    def _samples_path(self, task: str) -> Place | None:
        # A task's name comes from the file: it may not point out of the folder, and no file has such a long one.
        name = f"{os.path.basename(task)}.parquet"
        path = self.folder / "samples" / name
        return path if "\0" not in name and len(name.encode(errors="replace")) < 256 and path.is_file() else None


def load_evaluations(folders: Sequence[str | Place]) -> list[Evaluation]:
    """Read the results of several folders, in the given order, each with a label of its own."""
    paths = [place(folder) for folder in folders]
    if not paths:
        raise ValueError("no results: name at least one folder written by open-qwen2vl evaluate")
    for path, times in Counter(path.resolve() for path in paths).items():
        if times > 1:
            raise ValueError(f"{path}: given {times} times")
    contents = [_read_results(path) for path in paths]
    names = [str(results["model"]["name"]) for results in contents]
    return [
        Evaluation(name if names.count(name) == 1 else f"{name} ({path})", path, results)
        for name, path, results in zip(names, paths, contents, strict=True)
    ]


def sample_scores(table: pa.Table) -> np.ndarray:
    """Scores of samples, float64 `(samples,)`: NaN where there is none, or none that is finite."""
    scores = np.array([np.nan if score is None else score for score in table["score"].to_pylist()], dtype=np.float64)
    return np.where(np.isfinite(scores), scores, np.nan)


def is_number(value: object) -> bool:
    """Whether a value of a results file is a number, which is finite there."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_results(folder: Place) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        text = path.read_text(encoding="utf-8")
        results = json.loads(text, parse_float=_finite, parse_int=_finite, parse_constant=lambda _: None)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no results.json; name a folder written by open-qwen2vl evaluate") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    version = results.get("format_version") if isinstance(results, dict) else None
    if version != FORMAT_VERSION:
        shown = repr(version)[:40]
        raise ValueError(f"{path}: format_version {shown}, and {FORMAT_VERSION} is what this version reads")
    _require(path, "model", results.get("model"), dict)
    _require(path, "tasks", results.get("tasks"), dict)
    if "name" not in results["model"]:
        raise ValueError(f"{path}: lacks model.name")
    _require(path, "options", results.get("options"), dict, optional=True)
    _require(path, "seconds", results.get("seconds"), (int, float), optional=True)
    _require(path, "shots", results.get("shots"), (int, list), optional=True)
    for task, entry in results["tasks"].items():
        _check_task(path, f"task {task[:80]}", entry)
    return results


def _check_task(path: Place, place: str, entry: Any) -> None:
    _require(path, place, entry, dict)
    _require(path, f"{place}: metrics", entry.get("metrics"), dict)
    main = entry.get("main_metric")
    if not isinstance(main, str) or main not in entry["metrics"]:
        raise ValueError(f"{path}: {place}: main_metric {str(main)[:80]!r} is not in its metrics")
    for name, metric in entry["metrics"].items():
        _require(path, f"{place}: metric {name[:80]}", metric, dict)
    _require(path, f"{place}: num_samples", entry.get("num_samples"), int)
    _require(path, f"{place}: shots", entry.get("shots"), int, optional=True)
    _require(path, f"{place}: categories", entry.get("categories"), dict, optional=True)
    for name, part in (entry.get("categories") or {}).items():
        _require(path, f"{place}: category {name[:80]}", part, dict)
        _require(path, f"{place}: category {name[:80]}: num_samples", part.get("num_samples"), int)


def _require(path: Place, place: str, value: Any, kinds: type | tuple[type, ...], optional: bool = False) -> None:
    wrong = not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)
    if wrong and not (optional and value is None):
        raise ValueError(f"{path}: {place} is {type(value).__name__}, not what evaluate writes there")


def _finite(text: str) -> int | float | None:
    number = float(text)
    if not math.isfinite(number):
        return None
    return int(text) if text.lstrip("-").isdigit() and abs(number) < 2**53 else number


def _image_files(entries: Any) -> Iterator[bytes]:
    for entry in entries if isinstance(entries, list) else []:
        data = entry.get("bytes") if isinstance(entry, dict) else None
        if isinstance(data, bytes) and 0 < len(data) <= LARGEST_IMAGE:
            yield data


@contextlib.contextmanager
def _parquet(path: Place) -> Iterator[pq.ParquetFile]:
    """An open file; whatever is wrong with it is one line."""
    try:
        with pq.ParquetFile(arrow_source(path)) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: no parquet file of samples: {error}") from error
