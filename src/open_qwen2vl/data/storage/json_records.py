r"""Where the records of a huge JSON file are, without holding more than a block of it.

A file is an array of objects (LLaVA's, MAmmoTH's: often one line of 20 GB) or has an object in each line (jsonl).
Lines are cut at newlines, an array at the braces that stand in no string: quotes, escapes and braces are all that is
looked at, a block at a time with numpy. What a record holds is parsed when it is read, so that a broken one costs
itself only. An array whose braces do not match has no records to go on with and is an error that names the byte.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...places import OpenFile, Place, open_file
from ...processing.sample_error import SampleError

MAX_RECORD_BYTES = 8 << 20  # a larger record is skipped unread; no context is as long
_BLOCK = 1 << 20
_HEAD = 1 << 12


def cut_records(path: str | Place, number: int) -> list[tuple[int, int]]:
    """Cut a file into groups of so many records: first byte and that behind; a `ValueError` for a broken array."""
    groups, taken = [], 0
    start = stop = None
    for spans in _span_blocks(path, 0, None):
        position = 0
        while position < len(spans):
            if taken == 0:
                start = int(spans[position, 0])
            step = min(number - taken, len(spans) - position)
            position, taken = position + step, taken + step
            stop = int(spans[position - 1].sum())
            if taken == number:
                groups.append((start, stop))
                taken = 0
    return groups + ([(start, stop)] if taken else [])


def record_spans(path: str | Place, start: int, stop: int | None) -> Iterator[tuple[int, int]]:
    """Offset and size of the records between two bytes (None: to the end), also of too large ones and blank lines."""
    for spans in _span_blocks(path, start, stop):
        yield from map(tuple, spans.tolist())


def read_record(file: OpenFile, offset: int, size: int, max_bytes: int | None = None) -> Any:
    """Read and parse one record, None for a blank line; or `record_too_large` or `invalid_json`."""
    if size > (MAX_RECORD_BYTES if max_bytes is None else max_bytes):
        raise SampleError("record_too_large", f"the record at byte {offset} has {size:,} bytes")
    try:
        text = file.read_at(size, offset).decode("utf-8-sig" if offset == 0 else "utf-8")
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise SampleError("invalid_json", f"the record at byte {offset}: {error}") from error


def _span_blocks(path: str | Place, start: int, stop: int | None) -> Iterator[np.ndarray]:
    """Locations of records, int64 (n, 2), block by block."""
    with open_file(path, whole=True) as file:
        stop = file.size if stop is None else stop
        head = file.read_at(_HEAD, 0).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not head.startswith(b"["):
            yield from _lines(file, start, stop)
            return
        if stop == file.size:
            _check_end(path, file, stop)
        yield from _objects(path, file, start, stop)


def _blocks(file: OpenFile, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    for offset in range(start, stop, _BLOCK):
        yield offset, np.frombuffer(file.read_at(min(_BLOCK, stop - offset), offset), np.uint8)


def _lines(file: OpenFile, start: int, stop: int) -> Iterator[np.ndarray]:
    first = start
    for offset, block in _blocks(file, start, stop):
        ends = np.flatnonzero(block == ord("\n")) + offset + 1
        yield _as_spans(np.concatenate([[first], ends[:-1]]) if len(ends) else ends, ends)
        first = int(ends[-1]) if len(ends) else first
    if first < stop:
        yield _as_spans(np.array([first]), np.array([stop]))


def _objects(path: str | Place, file: OpenFile, start: int, stop: int) -> Iterator[np.ndarray]:
    scanner, opened = _BraceScanner(), np.empty(0, np.int64)
    for offset, block in _blocks(file, start, stop):
        starts, ends = scanner.scan(block)
        opened = np.concatenate([opened, starts + offset])
        if scanner.depth < 0 or len(ends) > len(opened):
            raise ValueError(f"{path}: a closing brace without an opening one between byte {offset} and "
                             f"{offset + len(block)}: invalid JSON there")  # fmt: skip
        yield _as_spans(opened[: len(ends)], ends + offset + 1)
        opened = opened[len(ends) :]
    if len(opened):
        raise ValueError(f"{path}: the record at byte {opened[0]} does not end: invalid JSON there (a quote or brace "
                         "too few or too many), or a file that was cut off")  # fmt: skip


def _as_spans(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    return np.stack([starts, ends - starts], axis=1)


def _check_end(path: str | Place, file: OpenFile, size: int) -> None:
    tail = file.read_at(_HEAD, max(0, size - _HEAD)).rstrip()
    if not tail.endswith(b"]"):
        raise ValueError(f"{path}: the array does not end with ] at byte {size}: the file was cut off")


class _BraceScanner:
    """Top-level braces of a stream of blocks; between two it keeps whether it stands in a string, and the depth."""

    def __init__(self):
        self.in_string = False
        self.escaped = False  # the next byte follows an active backslash
        self.depth = 0

    def scan(self, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the block of the braces that open an object at depth 0 and of those that close one."""
        quotes = block == ord('"')
        escaped = self._escaped_positions(block)
        quotes[escaped] = False
        quotes = np.flatnonzero(quotes)
        braces = np.flatnonzero((block == ord("{")) | (block == ord("}")))
        outside = (np.searchsorted(quotes, braces) + self.in_string) % 2 == 0
        braces = braces[outside]
        steps = np.where(block[braces] == ord("{"), 1, -1)
        depths = self.depth + np.cumsum(steps)
        self.in_string ^= bool(len(quotes) % 2)
        self.depth = int(depths[-1]) if len(depths) else self.depth
        return braces[(steps == 1) & (depths == 1)], braces[(steps == -1) & (depths == 0)]

    def _escaped_positions(self, block: np.ndarray) -> np.ndarray:
        backslashes = np.flatnonzero(block == ord("\\"))
        first = np.array([0] if self.escaped else [], np.int64)
        if self.escaped:
            backslashes = backslashes[backslashes > 0]
        # In a run of backslashes each second one is escaped by the one before it.
        is_start = np.diff(backslashes, prepend=-2) > 1
        starts = np.maximum.accumulate(np.where(is_start, np.arange(len(backslashes)), 0))
        active = backslashes[(np.arange(len(backslashes)) - starts) % 2 == 0]
        self.escaped = bool(len(active) and active[-1] == len(block) - 1)
        return np.concatenate([first, active[: len(active) - self.escaped] + 1])
