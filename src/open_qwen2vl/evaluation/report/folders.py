"""Reading what evaluations left: `results.json` and `samples/TASK.parquet` of each folder.

Files may come from other people: everything in them is text to be shown, nothing is trusted or executed.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FORMAT_VERSION = 1
TEXT_COLUMNS = ("sample_id", "category", "prompt", "answer", "prediction", "response", "score")


class Evaluation(NamedTuple):
    """One folder.

    Attributes:
        label (`str`): the model's name, with the folder where two have the same name.
        folder (`Path`): where it lies.
        results (`dict`): content of `results.json`.
    """

    label: str
    folder: Path
    results: dict[str, Any]

    def read_samples(self, task: str) -> pa.Table | None:
        """Samples of a task without their images, `None` where the folder has none.

        Args:
            task (`str`): its name in `results.json`.

        Returns:
            `pa.Table` with `TEXT_COLUMNS`, a row for each sample in the order of the file.

        Raises:
            ValueError: if the file cannot be read or lacks a column.
        """
        path = self._samples_path(task)
        if path is None:
            return None
        with _open_parquet(path) as file:
            missing = [name for name in (*TEXT_COLUMNS, "images") if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(f"{path}: has no column {', '.join(missing)}")
            return file.read(columns=list(TEXT_COLUMNS))

    def read_images(self, task: str, rows: Iterable[int]) -> dict[int, list[bytes]]:
        """Images of some samples; the others' stay on the disk.

        Args:
            task (`str`): its name in `results.json`.
            rows (`Iterable[int]`): rows of the file.

        Returns:
            `dict[int, list[bytes]]`: content of the image files by row.
        """
        wanted, images, start = set(rows), {}, 0
        path = self._samples_path(task)
        if path is None or not wanted:
            return images
        with _open_parquet(path) as file:
            for batch in file.iter_batches(batch_size=256, columns=["images"]):
                column = batch.column("images")
                for row in sorted(wanted.intersection(range(start, start + len(batch)))):
                    entries = column[row - start].as_py() or []
                    images[row] = [entry["bytes"] for entry in entries if entry and entry["bytes"]]
                start += len(batch)
        return images

    def _samples_path(self, task: str) -> Path | None:
        # A task's name comes from the file: it may not point out of the folder.
        path = self.folder / "samples" / f"{os.path.basename(task)}.parquet"
        return path if path.is_file() else None


def load_evaluations(folders: Sequence[str | Path]) -> list[Evaluation]:
    """Read the results of several folders.

    Args:
        folders (`Sequence[str | Path]`): outputs of `open-qwen2vl evaluate`.

    Returns:
        `list[Evaluation]`: in the given order, each with a label of its own.

    Raises:
        ValueError: if none is given, one is given twice, has no `results.json`, or has one of another form.
    """
    paths = [Path(folder) for folder in folders]
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
    """Scores of samples, as floats.

    Args:
        table (`pa.Table`): with a column `score`.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64: NaN where there is none.
    """
    return np.array([np.nan if score is None else score for score in table["score"].to_pylist()], dtype=np.float64)


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no results.json; name a folder written by open-qwen2vl evaluate") from error
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    version = results.get("format_version") if isinstance(results, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version {version!r}, and {FORMAT_VERSION} is what this version reads")
    if not isinstance(results.get("tasks"), dict) or "name" not in results.get("model", {}):
        raise ValueError(f"{path}: lacks model.name or tasks")
    for task, entry in results["tasks"].items():
        if entry.get("main_metric") not in entry.get("metrics", {}):
            raise ValueError(f"{path}: task {task}: main_metric {entry.get('main_metric')!r} is not in its metrics")
    return results


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: no parquet file: {error}") from error
