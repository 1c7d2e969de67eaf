"""Records of a CSV file by their bytes: a header, then a row in each line, or several where a quoted field has them.

Only quotes are looked at to find the rows, a block at a time; a row is parsed when it is read.
"""

import csv
import functools
import io
from collections.abc import Iterator

import numpy as np

from ...places import OpenFile, Place, identity, open_file, open_stream
from ...processing.sample_error import SampleError
from .json_records import MAX_RECORD_BYTES

_BLOCK = 1 << 20


def csv_header(path: str | Place) -> list[str]:
    """The names of the columns; a `ValueError` if they cannot be read."""
    return list(_header(str(path), str(identity(path))))


@functools.lru_cache(64)
def _header(path: str, identity: str) -> tuple[str, ...]:
    # A row that is not UTF-8 costs itself only, so that it may stand in what is read with the header.
    raw = io.BufferedReader(open_stream(path))
    with io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            return tuple(next(csv.reader(file), ()))
        except csv.Error as error:
            raise ValueError(f"{path}: not a CSV file that can be read: {error}") from error


def cut_csv(path: str | Place, number: int) -> list[tuple[int, int]]:
    """Cut a file into groups of rows: first byte of each and the byte behind it."""
    groups, taken, start, stop = [], 0, 0, 0
    for offset, size in csv_spans(path, 0, None):
        start, stop, taken = offset if not taken else start, offset + size, taken + 1
        if taken == number:
            groups.append((start, stop))
            taken = 0
    return groups + ([(start, stop)] if taken else [])


def csv_spans(path: str | Place, start: int, stop: int | None) -> Iterator[tuple[int, int]]:
    """Offset and size of each row between two bytes that bound rows (None: to the end); the header is none."""
    first, quotes, is_header = start, 0, start == 0
    with open_file(path, whole=True) as file:
        stop = file.size if stop is None else stop
        for offset in range(start, stop, _BLOCK):
            block = np.frombuffer(file.read_at(min(_BLOCK, stop - offset), offset), np.uint8)
            # A quote inside a field is doubled, so that a newline is a row's end behind an even number of quotes.
            even = (quotes + np.cumsum(block == ord('"'))) % 2 == 0
            quotes += int(np.count_nonzero(block == ord('"')))
            for end in (np.flatnonzero((block == ord("\n")) & even) + offset + 1).tolist():
                if not is_header:
                    yield first, end - first
                first, is_header = end, False
    if first < stop and not is_header:
        yield first, stop - first


def read_csv_record(file: OpenFile, header: list[str], offset: int, size: int) -> dict[str, str | None] | None:
    """One row by the names of the columns, empty fields as None; None for a blank line."""
    if size > MAX_RECORD_BYTES:
        raise SampleError("record_too_large", f"the row at byte {offset} has {size:,} bytes")
    try:
        rows = list(csv.reader(file.read_at(size, offset).decode().splitlines(keepends=True)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise SampleError("invalid_csv", f"the row at byte {offset}: {error}") from error
    if not rows or not rows[0]:
        return None
    if len(rows) > 1 or len(rows[0]) != len(header):
        raise SampleError("invalid_csv", f"the row at byte {offset} has {len(rows[0])} fields, not {len(header)}")
    return {name: value or None for name, value in zip(header, rows[0], strict=True)}
