"""The index beside a tar, `00000.index.parquet` of `00000.tar`: what is in it, without walking its headers.

    key, uid         of each sample, in the order of the tar
    members          extension, byte offset and size of its files
    width, height    of its image as the header has it, before any rotation by EXIF; null if it cannot be read

`reshard` writes it and `pack` reads it. It holds for a tar of the size that it was made for; whoever reads a member by
it makes sure of the member's header.
"""

import json
import logging
import os
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...files import renamed_when_whole
from ...processing.images import read_image_size
from ...processing.sample_error import SampleError
from .open_files import read_at
from .tars import MAX_IMAGE_BYTES, Sample

logger = logging.getLogger(__name__)

_METADATA_KEY = b"open_qwen2vl"
_MEMBERS = pa.list_(pa.struct([("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]))
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("uid", pa.string()),
        ("members", _MEMBERS),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
_HEADER = 512  # bytes of a member's header in a tar
_HEADER_BYTES = 4096  # of an image: most name their size within them
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # of a JPEG: what follows has the size


def index_path(tar: Path) -> Path:
    """The name of a tar's index.

    Args:
        tar (`Path`): `NAME.tar`.

    Returns:
        `Path`: `NAME.index.parquet` in the same folder.
    """
    return tar.with_suffix(".index.parquet")


def write_shard_index(path: Path, table: pa.Table, tar_bytes: int) -> None:
    """Write an index.

    Args:
        path (`Path`): its file, which appears when it is whole.
        table (`pa.Table`): columns of `SCHEMA`.
        tar_bytes (`int`): size of the tar.
    """
    metadata = {_METADATA_KEY: json.dumps({"tar_bytes": tar_bytes})}
    with renamed_when_whole(path) as temporary:
        pq.write_table(table.cast(SCHEMA).replace_schema_metadata(metadata), temporary, compression="zstd")


def read_shard_index(tar: str | Path) -> tuple[list[Sample], list[str]] | None:
    """The samples of a tar by its index, in the order of the tar and without their spans, and their uids.

    `None` if there is no index, or one that is not of a tar of this size or damaged, which is logged.
    """
    path = index_path(Path(tar))
    if not path.exists():
        return None
    try:
        table = _checked_table(path, os.path.getsize(tar))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(path)
            raise
        logger.warning("%s is not the index of %s: not used (%s)", path, tar, error)
        return None
    members = table["members"].combine_chunks()
    ends = np.cumsum(members.value_lengths()).tolist()
    extensions, offsets, sizes = (column.to_pylist() for column in members.flatten().flatten())
    places = list(zip(offsets, sizes, strict=True))
    samples, start = [], 0
    for key, end in zip(table["key"].to_pylist(), ends, strict=True):
        samples.append(Sample(key, dict(zip(extensions[start:end], places[start:end], strict=True))))
        start = end
    return samples, table["uid"].to_pylist()


def _checked_table(path: Path, tar_bytes: int) -> pa.Table:
    """Key, uid and members of an index whose values can all be those of a tar of this size; else a ValueError."""
    with pq.ParquetFile(path) as file:
        if json.loads(file.schema_arrow.metadata[_METADATA_KEY])["tar_bytes"] != tar_bytes:
            raise ValueError("made for a tar of another size")
        if file.metadata.num_rows * _HEADER > tar_bytes:
            raise ValueError("more samples than fit into the tar")
        table = file.read(columns=["key", "uid", "members"], use_threads=False)
    table = table.cast(pa.schema([SCHEMA.field(name) for name in ("key", "uid", "members")]))
    table.validate(full=True)
    extensions, offsets, sizes = table["members"].combine_chunks().flatten().flatten()
    if any(column.null_count for column in (table["key"], table["uid"], table["members"], extensions, offsets, sizes)):
        raise ValueError("nulls in it")
    offsets, sizes = offsets.to_numpy(), sizes.to_numpy()
    # Compared without a sum, which may be above what int64 holds.
    if len(offsets) and not ((offsets >= _HEADER) & (sizes >= 0) & (sizes <= tar_bytes - offsets)).all():
        raise ValueError("members outside of the tar")
    if not pc.all(pc.match_substring_regex(table["uid"], "^[0-9a-f]{32}$"), min_count=0).as_py():
        raise ValueError("uids that are none")
    if len(pc.unique(table["key"])) != len(table):
        raise ValueError("keys that come twice")
    return table


def member_image_size(file: int, offset: int, size: int) -> tuple[int, int] | None:
    """Width and height of an image in a tar, from its header.

    Args:
        file (`int`): descriptor of the open tar.
        offset (`int`): first byte of the image file.
        size (`int`): its bytes.

    Returns:
        `tuple[int, int]`: in pixels, as they stand there; `None` if the header cannot be read.
    """
    found = _quick_size(read_at(file, min(size, _HEADER_BYTES), offset))
    if found is not None:
        return found
    try:
        return read_image_size(read_at(file, min(size, MAX_IMAGE_BYTES), offset))
    except SampleError:
        return None


def _quick_size(head: bytes) -> tuple[int, int] | None:
    """The size that a PNG or a usual JPEG names at its beginning, ten times faster than Pillow opens it."""
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR" and len(head) >= 24:
        return struct.unpack_from(">II", head, 16)
    if head[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker, length = struct.unpack_from(">BH", head, at + 1)
        if marker in _FRAME_MARKERS:
            height, width = struct.unpack_from(">HH", head, at + 5)
            return (width, height) if width and height else None
        if not 0xC0 <= marker < 0xFF or 0xD0 <= marker <= 0xD9:
            return None  # not a segment with a length
        at += 2 + length
    return None
