"""Rows of Hugging Face data sets: parquet files, and the arrow files of a folder from `Dataset.save_to_disk`.

Both come in batches of rows (parquet's row groups, arrow's record batches); a row is read through its batch. Columns
that nobody asks for are not touched, and to plan a parquet file no byte of an image is read.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...processing.conversation_records import FLAGS, OTHER_MEDIA, SYSTEM, UNREAD
from ...processing.conversation_records import TURNS as TEXT_COLUMNS

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("images", "image")
BESIDE_TURNS = ("id", *OTHER_MEDIA, *SYSTEM, *FLAGS, *UNREAD)
COLUMNS = (*TEXT_COLUMNS, *IMAGE_COLUMNS, *BESIDE_TURNS)
_SPLIT = re.compile(r"(.+)-\d+-of-\d+\.parquet$")  # as the Hub names them
LARGE_BATCH = 256 << 20  # bytes; each row of a parquet file costs the reading of its whole batch
LEVELS = 64  # bytes: far above what parquet spends on a null


class Columns(NamedTuple):
    """The columns of a table that are read.

    Attributes:
        texts (`tuple[str, ...]`): what is read whole, to plan as well.
        images (`tuple[str, ...]`): an image or a list of images in each row: structs of bytes and path, or paths.
    """

    texts: tuple[str, ...]
    images: tuple[str, ...]


CONVERSATION_COLUMNS = Columns((*TEXT_COLUMNS, *BESIDE_TURNS), IMAGE_COLUMNS)


def column_names(path: str | os.PathLike) -> list[str]:
    """The names of a table's columns in order; a `ValueError` if it is no such file."""
    return list(column_types(path))


def column_types(path: str | os.PathLike) -> dict[str, pa.DataType]:
    """The types of a table's columns; a `ValueError` if it is no such file."""
    try:
        if os.fspath(path).endswith(".parquet"):
            schema = pq.read_schema(path)
        else:
            with pa.memory_map(os.fspath(path)) as file:
                schema = pa.ipc.open_stream(file).schema
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a table that can be read: {error}") from error
    return dict(zip(schema.names, schema.types, strict=True))


def split_names(files: Iterable[str]) -> list[str]:
    """The splits that parquet files belong to.

    Args:
        files (`Iterable[str]`): their names, perhaps with folders.

    Returns:
        `list[str]`: what stands before `-00000-of-00001.parquet`, as the Hub names them, each once and sorted.
    """
    return sorted({match[1] for file in files if (match := _SPLIT.match(file))})


def find_tables(path: Path) -> list[Path]:
    """The tables of a data set's folder.

    Args:
        path (`Path`): a folder from `Dataset.save_to_disk`, or one that holds parquet files.

    Returns:
        `list[Path]`: its files in order; none if it is neither.

    Raises:
        ValueError: if it holds several splits.
    """
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf8"))["splits"]
        raise ValueError(f"{path} holds the splits {', '.join(splits)}: name one, as {path / splits[0]}")
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text(encoding="utf8"))
        return [path / file["filename"] for file in state["_data_files"]]
    files = sorted(path.glob("*.parquet"))
    splits = split_names(file.name for file in files)
    if len(splits) > 1:
        raise ValueError(
            f"{path} holds the splits {', '.join(splits)}: name the files, as {path / splits[-1]}-*.parquet"
        )
    return files


def cut_rows(path: str | os.PathLike, number: int, columns: Columns) -> list[tuple[int, int]]:
    """Cut a table into groups of whole batches.

    Args:
        path (`str | os.PathLike`): a `.parquet` or `.arrow` file.
        number (`int`): rows of a group; more where a single batch has more.
        columns ([`Columns`]): those that will be read.

    Returns:
        `list[tuple[int, int]]`: first row of each group and the row behind it.

    Raises:
        ValueError: if it is no such file.
    """
    table = RowTable(path, columns)
    ends = [int(end) for end in table.ends]
    table.close()
    groups, start = [], 0
    for stop, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or following - start > number:
            groups.append((start, stop))
            start = stop
    return groups


class RowTable:
    """One table.

    Args:
        path (`str | os.PathLike`): a `.parquet` or `.arrow` file.
        columns ([`Columns`]): those to read, of which some may be missing.

    Attributes:
        ends (`np.ndarray`): number of the row behind each batch.

    Raises:
        ValueError: if it is no such file.
    """

    def __init__(self, path: str | os.PathLike, columns: Columns):
        self.path = os.fspath(path)
        self._columns = columns
        self._is_parquet = self.path.endswith(".parquet")
        try:
            self._open()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a table that can be read: {error}") from error
        self._images = [name for name in columns.images if name in self._names]

    def _open(self) -> None:
        if self._is_parquet:
            self._file = pq.ParquetFile(self.path, memory_map=True)
            groups = [self._file.metadata.row_group(i) for i in range(self._file.metadata.num_row_groups)]
            rows, sizes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
            self._names = self._file.schema_arrow.names
            self._leaves = [self._file.schema.column(i).path for i in range(len(self._file.schema))]
            if max(sizes, default=0) > LARGE_BATCH:
                logger.warning("%s has row groups of %d MB, each row costs reading one: save it with smaller ones",
                               self.path, max(sizes) >> 20)  # fmt: skip
        else:
            self._file = pa.memory_map(self.path)
            reader = pa.ipc.open_stream(self._file)
            self._batches = list(reader)  # their columns stay in the mapped file
            rows, self._names = [batch.num_rows for batch in self._batches], reader.schema.names
        self.ends = np.cumsum(rows, dtype=np.int64)

    def close(self) -> None:
        """Close the file; rows of an arrow file that are still in use stay."""
        if self._is_parquet:
            self._file.close()

    def find(self, number: int) -> tuple[int, int]:
        """Where a row is.

        Args:
            number (`int`): its number in the file.

        Returns:
            `tuple[int, int]`: its batch, and its number in that.

        Raises:
            IndexError: if there are fewer rows.
        """
        batch = int(np.searchsorted(self.ends, number, side="right"))
        if not 0 <= batch < len(self.ends):
            raise IndexError(f"{self.path}: no row {number}")
        return batch, number - (int(self.ends[batch - 1]) if batch else 0)

    def read_batch(self, batch: int, without_bytes: bool = False) -> pa.RecordBatch | pa.Table:
        """The rows of a batch.

        Args:
            batch (`int`): its number.
            without_bytes (`bool`, *optional*, defaults to `False`): leave out the content of images that have a path
                beside it, if only an empty one.

        Returns:
            `pa.RecordBatch | pa.Table`: the columns.
        """
        names = [name for name in self._columns.texts if name in self._names] + self._images
        if not self._is_parquet:
            rows = self._batches[batch].select(names)
            if not without_bytes:
                return rows
            return pa.table({n: _without_bytes(rows[n]) if n in self._images else rows[n] for n in names})
        leaves = [path for path in self._leaves if path.split(".")[0] in names]
        if without_bytes:
            paths = {path.removesuffix(".path") for path in leaves if path.endswith(".path")}
            leaves = [p for p in leaves if not (self._is_bytes(p) and p.removesuffix(".bytes") in paths)]
        return self._file.read_row_group(batch, columns=leaves, use_threads=False)

    def rows_to_plan(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows as a planner needs them: an image's bytes are empty, or None where its whole batch has only paths.

        Args:
            start (`int`): the first row.
            stop (`int`): the row behind the last.

        Yields:
            `tuple[int, dict]`: number and columns of each row.
        """
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        for batch in range(first, last + 1):
            before = int(self.ends[batch - 1]) if batch else 0
            content = b"" if self._has_bytes(batch) else None
            for number, row in enumerate(self.read_batch(batch, without_bytes=True).to_pylist(), start=before):
                if start <= number < stop:
                    self._fill_in_bytes(row, content)
                    yield number, row

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and columns of each row from `start` to the one before `stop`, images with their bytes."""
        for number in range(start, stop):
            batch, row = self.find(number)
            if row == 0 or number == start:
                rows = self.read_batch(batch)
            yield number, rows.slice(row, 1).to_pylist()[0]

    def _has_bytes(self, batch: int) -> bool:
        """Whether any image of a batch is there with its content and not by its path only."""
        if not self._is_parquet:
            return any(_holds_bytes(self._batches[batch][name]) for name in self._images)
        group = self._file.metadata.row_group(batch)
        for number, leaf in enumerate(self._leaves):
            if not self._is_bytes(leaf):
                continue
            chunk = group.column(number)
            if chunk.total_uncompressed_size > LEVELS * (1 + chunk.num_values):
                return True  # more than what says which values are null
            column = self._file.read_row_group(batch, columns=[leaf], use_threads=False)[leaf.split(".")[0]]
            if any(map(_holds_bytes, column.chunks)):
                return True
        return False

    def _is_bytes(self, leaf: str) -> bool:
        return leaf.split(".")[0] in self._images and leaf.endswith(".bytes")

    def _fill_in_bytes(self, row: dict[str, Any], content: bytes | None) -> None:
        for name in self._images:
            images = row[name]
            for image in images if isinstance(images, list) else [images]:
                if isinstance(image, dict) and "bytes" not in image:
                    image["bytes"] = content


def _holds_bytes(column: pa.Array) -> bool:
    structs = _structs(column)
    if structs is None or structs.type.get_field_index("bytes") < 0:
        return False
    return structs.field("bytes").null_count < len(structs)


def _structs(column: pa.Array) -> pa.StructArray | None:
    """The images of a column, one or a list a row; None if they are no structs of bytes and path."""
    values = column.values if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) else column
    return values if pa.types.is_struct(values.type) else None


def _without_bytes(column: pa.Array) -> pa.Array:
    """A column of images whose structs have their path only; to convert it touches no image."""
    structs = _structs(column)
    if structs is None or structs.type.get_field_index("path") < 0:
        return column
    paths = pa.StructArray.from_arrays([structs.field("path")], ["path"], mask=structs.is_null())
    if structs is column:
        return paths
    kind = pa.LargeListArray if pa.types.is_large_list(column.type) else pa.ListArray
    return kind.from_arrays(column.offsets, paths, mask=column.is_null())
