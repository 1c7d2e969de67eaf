"""Reshard's second step: one output tar and its index, from ranges of bytes of the input tars.

Where everything goes is known from the sizes before the first byte is written. So each input tar is read from its
beginning to its end, whatever the order in the output, and samples that follow each other in both are one copy, made
by the kernel where it can.
"""

import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...files import renamed_when_whole, shard_path
from ...places import LocalFile, OpenFile, Place, arrow_source, identity, is_remote, open_file
from ..engine.engine import Outcome, ShardTask, collection_paused
from ..storage.open_files import Newest
from ..storage.tar_index import LOOKED_AT, field_names, index_table, is_image, member_image_size, write_shard_index
from ..storage.tars import MAX_TEXT_BYTES, Sample, padded_end, read_json
from ..storage.uids import format_uid, read_uids
from .pool_index import Layout

END_OF_TAR = 1024  # bytes, all zero
_CHUNK = 8 << 20
_GAP = 256 << 10  # bytes between two copies that are read rather than asked for apart
_AT_ONCE = 8


class TarWriter:
    """Writes one tar after the other, from the working folder of [`reshard`] and its recipe."""

    def __init__(self, output: Place, work: Place, subset: str, recipe: dict[str, Any]):
        self._output, self._work, self._recipe = output, work, recipe
        self._uids = read_uids(subset)
        self._layout = Layout(work, recipe["shuffle_seed"])
        self._tars = Newest(self._open)

    @collection_paused()
    def __call__(self, task: ShardTask) -> Outcome:
        """Write a tar, then its index, which is the task's output."""
        number, count = int(task.output.name.split(".")[0]), self._recipe["samples_per_shard"]
        tars, rows = self._layout.samples(number * count, (number + 1) * count)
        samples = self._read_rows(tars, rows)
        uids = [format_uid(high, low) for high, low in self._uids[samples["place"].to_numpy()].tolist()]
        placed = _Placed(samples, tars, uids)
        written = task.output.with_name(f"{number:05d}.tar")
        with renamed_when_whole(written) as temporary:
            with LocalFile(temporary, "w+b") as file:
                with ThreadPoolExecutor(_AT_ONCE) as pool:  # of remote tars many pieces are on their way at once
                    list(pool.map(lambda piece: self._copy_remote(*piece, file.fileno()), self._remote_pieces(placed)))
                for tar, source, length, target in placed.copies:
                    if not is_remote(self._recipe["shards"][tar]["path"]):
                        self._copy(tar, source, length, target, file.fileno())
                for target, header in placed.headers:
                    os.pwrite(file.fileno(), header, target)
                os.ftruncate(file.fileno(), placed.end + END_OF_TAR)
                table = _index_table(placed, uids, file)
                fields = field_names(read_json(file, sample) for sample in placed.first_with_json())
        write_shard_index(task.output, table, placed.end + END_OF_TAR, written, fields=fields)
        return Outcome(len(uids), {}, [])

    def _read_rows(self, tars: np.ndarray, rows: np.ndarray) -> pa.Table:
        tables, order = [], []
        for tar in np.unique(tars):
            own = np.flatnonzero(tars == tar)
            tables.append(pq.read_table(arrow_source(index_name(self._work, tar))).take(rows[own]))
            order.append(own)
        # The rows were read tar by tar: the place of each in the output undoes that.
        back = np.argsort(np.concatenate(order), kind="stable")
        return pa.concat_tables(tables).take(back).combine_chunks()

    def _open(self, tar: int) -> OpenFile:
        described = self._recipe["shards"][tar]
        path = shard_path(self._output, described)
        if any(described[name] != now for name, now in identity(path).items()):
            raise ValueError(f"{path}: has changed since the run began; run again with another output")
        return open_file(path)

    def _remote_pieces(self, placed: "_Placed") -> Iterator[tuple[OpenFile, list[tuple[int, int, int, int]]]]:
        """Copies from remote tars, those together that lie close to each other: one request reads them."""
        piece: list[tuple[int, int, int, int]] = []
        for copy in (one for one in placed.copies if is_remote(self._recipe["shards"][one[0]]["path"])):
            tar, source, length, _ = copy
            if piece and not (
                tar == piece[0][0] and source - sum(piece[-1][1:3]) <= _GAP and source + length - piece[0][1] <= _CHUNK
            ):
                yield self._tars[piece[0][0]], piece
                piece = []
            piece.append(copy)
        if piece:
            yield self._tars[piece[0][0]], piece

    def _copy_remote(self, file: OpenFile, piece: list[tuple[int, int, int, int]], output: int) -> None:
        start, end = piece[0][1], sum(piece[-1][1:3])
        for first in range(start, end, _CHUNK):  # of several pieces one is a single long copy
            content = file.read_at(min(_CHUNK, end - first), first)
            if len(content) < min(_CHUNK, end - first):
                raise ValueError(f"{file.name}: ends before byte {end}")
            for _, source, length, target in piece:
                low, high = max(source, first), min(source + length, first + len(content))
                if low < high:
                    os.pwrite(output, content[low - first : high - first], target + low - source)

    def _copy(self, tar: int, source: int, length: int, target: int, output: int) -> None:
        file = self._tars[tar]
        while length:  # the kernel may copy less than asked for, as from one file system to another
            copied = _copy_in_kernel(file, output, length, source, target)
            if not copied:
                copied = os.pwrite(output, file.read_at(min(length, _CHUNK), source), target)
            if not copied:
                raise ValueError(f"{shard_path(self._output, self._recipe['shards'][tar])}: ends before byte {source}")
            source, target, length = source + copied, target + copied, length - copied


def index_name(work: Place, tar: int) -> Place:
    """The working index of a tar of the pool, by its number."""
    return work / f"index-{tar:05d}.parquet"


class _Placed:
    """Where everything goes in an output tar."""

    def __init__(self, samples: pa.Table, tars: np.ndarray, uids: list[str]):
        self.keys: list[str] = []  # one that is taken already in this tar has the uid behind it
        self.members: list[list[tuple[str, int, int]]] = []  # extension, byte offset in the output and size
        self.copies: list[tuple[int, int, int, int]] = []  # tar, byte in it, length and byte in the output
        # Byte in the output and header of members with another name, or a new text with its header.
        self.headers: list[tuple[int, bytes]] = []
        self.end = 0  # bytes of all of it
        taken: set[str] = set()
        columns = (_lists(samples[name]) for name in ("span_start", "span_end", "ext", "offset", "size"))
        keys, captions = samples["key"].to_pylist(), samples["caption"].to_pylist()
        for tar, uid, key, caption, starts, ends, extensions, *places in zip(
            tars.tolist(), uids, keys, captions, *columns, strict=True
        ):
            spans, members = list(zip(starts, ends, strict=True)), list(zip(extensions, *places, strict=True))
            if key in taken or caption is not None:
                while key in taken:
                    key = f"{key}_{uid}"
                self._append_anew(tar, key, members, caption)
            else:
                self._append(tar, spans, members)
            taken.add(key)
            self.keys.append(key)
        self.copies.sort()  # by tar and byte in it: each input is read once, from its beginning to its end

    def first_with_json(self) -> Iterator[Sample]:
        """The json files among the first members."""
        members = ((key, *member) for key, own in zip(self.keys, self.members, strict=True) for member in own)
        for key, extension, offset, size in islice(members, LOOKED_AT):
            if extension == "json":
                yield Sample(key, {"json": (offset, size)})

    def _append(self, tar: int, spans: list[tuple[int, int]], members: list[tuple[str, int, int]]) -> None:
        placed = []
        for start, end in spans:
            shift = self.end - start
            # `<= end`: a member without bytes at the end of a span has its data, none, behind it.
            placed += [(ext, offset + shift, size) for ext, offset, size in members if start < offset <= end]
            self._copy(tar, start, end - start)
        self.members.append(placed)

    def _append_anew(self, tar: int, key: str, members: list[tuple[str, int, int]], caption: str | None) -> None:
        """Members under headers of their own, with another name or another caption."""
        placed = []
        text = None if caption is None else caption.encode()
        if text is not None and all(extension != "txt" for extension, *_ in members):
            members = [*members, ("txt", 0, 0)]
        for extension, offset, size in members:
            header = tarfile.TarInfo(f"{key}.{extension}")
            is_new = text is not None and extension == "txt"
            header.size = len(text) if is_new else size
            self.headers.append((self.end, header.tobuf(tarfile.GNU_FORMAT, "utf-8") + (text if is_new else b"")))
            start = self.end
            self.end += len(self.headers[-1][1])
            if is_new:
                placed.append((extension, self.end - len(text), len(text)))
                self.end = start + padded_end(0, self.end - start)
            else:
                placed.append((extension, self.end, size))
                self._copy(tar, offset, padded_end(offset, size) - offset)
        self.members.append(placed)

    def _copy(self, tar: int, source: int, length: int) -> None:
        if self.copies:
            last_tar, last_source, last_length, last_target = self.copies[-1]
            # Neighbours in both: one longer copy, which the kernel makes without a byte in this process.
            if (tar, source, self.end) == (last_tar, last_source + last_length, last_target + last_length):
                self.copies[-1] = (tar, last_source, last_length + length, last_target)
                self.end += length
                return
        self.copies.append((tar, source, length, self.end))
        self.end += length


def _lists(column: pa.ChunkedArray) -> list[list]:
    """The lists of a column, five times faster than by `to_pylist`."""
    lists = column.combine_chunks()
    values, ends = lists.flatten().to_numpy(zero_copy_only=False).tolist(), lists.value_lengths().to_numpy().cumsum()
    return [values[start:end] for start, end in pairwise([0, *ends.tolist()])]


def _index_table(placed: _Placed, uids: list[str], file: OpenFile) -> pa.Table:
    samples, texts = [], []
    for key, members in zip(placed.keys, placed.members, strict=True):
        samples.append(Sample(key, {extension: (offset, size) for extension, offset, size in members}))
        samples[-1].image_sizes = {
            extension: found
            for extension, offset, size in members
            if is_image(extension) and (found := member_image_size(file, offset, size))
        }
        offset, size = samples[-1].members.get("txt", (0, MAX_TEXT_BYTES + 1))
        texts.append(file.read_at(size, offset) if size <= MAX_TEXT_BYTES else None)
    return index_table(samples, uids, texts)


def _copy_in_kernel(source: OpenFile, target: int, length: int, offset: int, target_offset: int) -> int:
    """Bytes copied; 0 where the system, or one of the file systems, cannot do it."""
    if not isinstance(source, LocalFile):
        return 0
    try:
        return os.copy_file_range(source.fileno(), target, length, offset, target_offset)
    except (OSError, AttributeError):
        return 0
