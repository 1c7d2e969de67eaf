"""Rows of Hugging Face data sets: parquet files, and the arrow files of a folder from `Dataset.save_to_disk`.

Both come in batches of rows (parquet's row groups, arrow's record batches); a row is read through its batch. Columns
that nobody asks for are not touched. To plan a parquet file no byte of an image is read, unless some images of a row
group are there by their path and some with their bytes.
"""

import contextlib
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

from ...places import Place, arrow_source, is_remote, open_stream
from ...processing.conversation_records import FLAGS, SYSTEM, UNREAD
from ...processing.conversation_records import TURNS as TEXT_COLUMNS
from ...processing.media_records import OTHER_MEDIA
from ...processing.sample_error import SampleError
from .row_values import row_values

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("images", "image", "videos", "video")
BESIDE_TURNS = ("id", "tools", *OTHER_MEDIA, *SYSTEM, *FLAGS, *UNREAD)
COLUMNS = (*TEXT_COLUMNS, *IMAGE_COLUMNS, *BESIDE_TURNS)
_SPLIT = re.compile(r"(.+)-\d+-of-\d+\.parquet$")  # as the Hub names them
LARGE_BATCH = 256 << 20  # bytes; each row of a parquet file costs the reading of its whole batch
MOST_VALUES = 1 << 27  # of a column in a row group: a few bytes may claim any number of nulls


class Columns(NamedTuple):
    """The columns of a table that are read."""

    texts: tuple[str, ...]  # what is read whole, to plan as well
    images: tuple[str, ...]  # an image or a list of images in each row: structs of bytes and path, or paths


CONVERSATION_COLUMNS = Columns((*TEXT_COLUMNS, *BESIDE_TURNS), IMAGE_COLUMNS)


def column_names(path: str | Place) -> list[str]:
    """The names of a table's columns in order; a `ValueError` if it is no such file."""
    return list(column_types(path))


def column_types(path: str | Place) -> dict[str, pa.DataType]:
    """The types of a table's columns; a `ValueError` if it is no such file."""
    with _readable(path):
        if str(path).endswith(".parquet"):
            schema = pq.read_schema(arrow_source(path))
        else:
            with open_stream(path) as file:
                schema = pa.ipc.open_stream(file).schema
        return dict(zip(schema.names, schema.types, strict=True))


def split_names(files: Iterable[str]) -> list[str]:
    """What stands before `-00000-of-00001.parquet` in the names of files, as the Hub has them: once each, sorted."""
    return sorted({match[1] for file in files if (match := _SPLIT.match(file))})


def find_tables(path: Place) -> list[Place]:
    """The tables of a data set's folder in order, none if it is no such; a `ValueError` if it holds several splits."""
    if (path / "dataset_dict.json").is_file():
        splits = list(map(str, _read_json(path / "dataset_dict.json")["splits"]))
        raise ValueError(f"{path} holds the splits {', '.join(splits)}: name one, as {path / splits[0]}")
    if (path / "state.json").is_file():
        return [path / Path(file["filename"]).name for file in _read_json(path / "state.json")["_data_files"]]
    files = sorted(path.glob("*.parquet"))
    splits = split_names(file.name for file in files)
    if len(splits) > 1:
        raise ValueError(
            f"{path} holds the splits {', '.join(splits)}: name the files, as {path / splits[-1]}-*.parquet"
        )
    return files


def _read_json(path: Place) -> dict[str, Any]:
    """A saved data set's own description, with the lists that are read from it."""
    try:
        content = json.loads(path.read_text(encoding="utf8"))
        if content.get("splits") or all(isinstance(file["filename"], str) for file in content["_data_files"]):
            return content
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        pass
    raise ValueError(f"{path}: not as Dataset.save_to_disk writes it")


def cut_rows(path: str | Place, number: int, columns: Columns) -> list[tuple[int, int]]:
    """Cut a table into groups of whole batches: first row of each group and the row behind it.

    A group has at most so many rows, or those of a single batch. A table without any batch, as Spark writes empty
    parts, has no groups. A `ValueError` if it is no table.
    """
    table = RowTable(path, columns)
    ends = [int(end) for end in table.ends]
    table.close()
    groups, start = [], 0
    for stop, following in zip(ends, [*ends[1:], None], strict=False):
        if following is None or following - start > number:
            groups.append((start, stop))
            start = stop
    return groups


class RowTable:
    """One table; `columns` are those to read, of which some may be missing. `ends` is the row behind each batch.

    A `ValueError` if it is no such file. Rows that cannot be decoded are a [`SampleError`] in their place.
    """

    def __init__(self, path: str | Place, columns: Columns):
        self.path = str(path)
        self._columns = columns
        self._is_parquet = self.path.endswith(".parquet")
        with _readable(self.path):
            self._open()
        self._images = [name for name in columns.images if name in self._names]

    def _open(self) -> None:
        if self._is_parquet:
            self._file = pq.ParquetFile(arrow_source(self.path))
            self._names = self._file.schema_arrow.names
            self._leaves = [self._file.schema.column(i).path for i in range(len(self._file.schema))]
            groups = [self._file.metadata.row_group(i) for i in range(self._file.metadata.num_row_groups)]
            if repeated := self._repeated_texts(groups):
                self._file = pq.ParquetFile(arrow_source(self.path), read_dictionary=repeated)
            rows, sizes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
            if max(sizes, default=0) > LARGE_BATCH:
                logger.warning("%s has row groups of %d MB, each row costs reading one: save it with smaller ones",
                               self.path, max(sizes) >> 20)  # fmt: skip
        elif is_remote(self.path):
            raise ValueError(f"{self.path}: .arrow files are mapped, which no bucket allows: save it as parquet")
        else:
            self._file = pa.memory_map(self.path)
            self._size = self._file.size()
            reader = pa.ipc.open_stream(self._file)
            self._batches = list(reader)  # their columns stay in the mapped file
            rows, self._names = [batch.num_rows for batch in self._batches], reader.schema.names
        self.ends = np.cumsum(rows, dtype=np.int64)

    def _repeated_texts(self, groups: list[Any]) -> list[str]:
        """Text leaves where a few stored values may stand for far more bytes: not to be written out for each row."""
        found = set()
        for group in groups:
            for number, leaf in enumerate(self._leaves):
                if leaf.split(".")[0] not in self._columns.texts:
                    continue
                chunk = group.column(number)
                if chunk.num_values > MOST_VALUES:
                    raise ValueError(f"{self.path}: a row group claims {chunk.num_values} values of {leaf}")
                # Of values above 4 KB there are no statistics.
                is_long = chunk.statistics is None or not chunk.statistics.has_min_max
                if is_long and chunk.has_dictionary_page and chunk.physical_type == "BYTE_ARRAY":
                    if chunk.num_values * chunk.total_uncompressed_size > LARGE_BATCH:
                        found.add(leaf)
        return sorted(found)

    def close(self) -> None:
        """Close the file; rows of an arrow file that are still in use stay."""
        if self._is_parquet:
            self._file.close()

    def find(self, number: int) -> tuple[int, int]:
        """The batch of a row, and its number in that; a [`SampleError`] if there are fewer rows."""
        batch = int(np.searchsorted(self.ends, number, side="right"))
        if not 0 <= batch < len(self.ends):
            raise SampleError("moved_row", f"{self.path}: no row {number}")
        return batch, number - (int(self.ends[batch - 1]) if batch else 0)

    def read_batch(self, batch: int, without_bytes: bool = False) -> pa.Table:
        """The rows of a batch, for [`row_values`]; images that have a path leaf without their bytes, if so asked.

        A [`SampleError`] `corrupt_table` if they cannot be read.
        """
        names = [name for name in self._columns.texts if name in self._names] + self._images
        try:
            if not self._is_parquet:
                self._check_length()
                return pa.table({name: self._column(batch, name, without_bytes) for name in dict.fromkeys(names)})
            leaves = [path for path in self._leaves if path.split(".")[0] in names]
            if without_bytes:
                paths = {path.removesuffix(".path") for path in leaves if path.endswith(".path")}
                leaves = [p for p in leaves if not (self._is_bytes(p) and p.removesuffix(".bytes") in paths)]
            return self._file.read_row_group(batch, columns=leaves, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                error.filename = error.filename or self.path
                raise
            raise SampleError("corrupt_table", f"{self.path}, batch {batch}: {error}") from error

    def _column(self, batch: int, name: str, without_bytes: bool) -> pa.Array:
        column = self._batches[batch].column(name)
        return _without_bytes(column) if without_bytes and name in self._images else column

    def _check_length(self) -> None:
        """A mapped file that was cut must not be touched: the process would die."""
        if os.stat(self.path).st_size < self._size:
            raise SampleError("corrupt_table", f"{self.path} has been cut since it was opened")

    def rows_to_plan(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any] | SampleError]]:
        """Number and columns of the rows of a range; an image's bytes are empty, or None where there are none."""
        for first, number in self._parts(start, stop):
            try:
                table = self.read_batch(number, without_bytes=True)
                filled = self._fill_in_bytes(number, table, row_values(table))
            except SampleError as error:
                filled = [error] * (int(self.ends[number]) - first)
            yield from ((n, row) for n, row in enumerate(filled, start=first) if start <= n < stop)

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any] | SampleError]]:
        """Number and columns of the rows of a range, images with their bytes."""
        for first, number in self._parts(start, stop):
            table = None
            for n in range(max(start, first), min(stop, int(self.ends[number]))):
                try:
                    table = self.read_batch(number) if table is None else table
                    (row,) = row_values(table.slice(n - first, 1))
                except SampleError as error:
                    row = error
                yield n, row

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """First row and number of the batches that have rows of a range."""
        for number, end in enumerate(self.ends.tolist()):
            first = int(self.ends[number - 1]) if number else 0
            if first < stop and end > start:
                yield first, number

    def _fill_in_bytes(self, batch: int, table: pa.Table, rows: list) -> list:
        """Rows whose images say whether their content is there."""
        for name in self._images:
            column = table[name].combine_chunks()
            structs = _structs(column)
            if structs is None or structs.type.get_field_index("bytes") >= 0:
                continue
            filled = self._presence(batch, name, len(structs) - structs.null_count)
            for number, row in enumerate(rows):
                images = row[name] if isinstance(row, dict) else None
                flags = filled[number] if isinstance(filled, list) else filled
                for index, image in enumerate(images if isinstance(images, list) else [images]):
                    if isinstance(image, dict):
                        is_there = flags[index] if isinstance(flags, list) else flags
                        image["bytes"] = b"" if is_there else None
        return rows

    def _presence(self, batch: int, name: str, count: int) -> bool | list:
        """Whether all or none of a batch's `count` images are there with their content, or for each row which are."""
        if not self._is_parquet:
            return _has_bytes(self._batches[batch].column(name))
        leaf = next((leaf for leaf in self._leaves if leaf.split(".")[0] == name and self._is_bytes(leaf)), None)
        if leaf is None:
            return False
        chunk = self._file.metadata.row_group(batch).column(self._leaves.index(leaf))
        if chunk.statistics is not None and chunk.statistics.has_null_count:
            filled = chunk.num_values - chunk.statistics.null_count
            if filled in (0, count):
                return filled > 0
        # Some have content and some have not: no other way than to look.
        return _has_bytes(self._file.read_row_group(batch, columns=[leaf], use_threads=False)[name].combine_chunks())

    def _is_bytes(self, leaf: str) -> bool:
        return leaf.split(".")[0] in self._images and leaf.endswith(".bytes")


def _has_bytes(column: pa.Array) -> bool | list:
    """For each row whether its image, or which of its images, has content."""
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    structs = column.values if is_list else column
    if not pa.types.is_struct(structs.type) or structs.type.get_field_index("bytes") < 0:
        return False
    flags = structs.field("bytes").is_valid()
    if is_list:
        kind = pa.LargeListArray if pa.types.is_large_list(column.type) else pa.ListArray
        flags = kind.from_arrays(column.offsets, flags, mask=column.is_null())
    return flags.to_pylist()


def _structs(column: pa.Array) -> pa.StructArray | None:
    """The images of a column, one or a list a row; None if they are no structs of bytes and path."""
    values = column.flatten() if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) else column
    return values if pa.types.is_struct(values.type) else None


def _without_bytes(column: pa.Array) -> pa.Array:
    """A column of images whose structs have their path only; to convert it touches no image."""
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    structs = column.values if is_list else column
    if not pa.types.is_struct(structs.type) or structs.type.get_field_index("path") < 0:
        return column
    paths = pa.StructArray.from_arrays([structs.field("path")], ["path"], mask=structs.is_null())
    if structs is column:
        return paths
    kind = pa.LargeListArray if pa.types.is_large_list(column.type) else pa.ListArray
    return kind.from_arrays(column.offsets, paths, mask=column.is_null())


@contextlib.contextmanager
def _readable(path: str | Place) -> Iterator[None]:
    """What pyarrow says of a file that is no table, as a ValueError with its name."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(path)
            raise
        raise ValueError(f"{path}: not a table that can be read: {error}") from error
