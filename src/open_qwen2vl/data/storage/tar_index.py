"""The index beside a tar, `00000.index.parquet` of `00000.tar`: what is in it, without walking its headers.

    key, uid    of each sample, in the order of the tar
    members     extension, byte offset and size of its files; of images also width and height, upright: after rotation
                by EXIF; null where the header cannot be read

`reshard` writes it and `pack` reads it, so that a plan opens no image, whatever its budget. It holds for a tar of the
size that it was made for; whoever reads a member by it makes sure of the member's header. An index of format version 1
has the sizes of before rotation, in columns of their own: they are not used.
"""

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...files import renamed_when_whole
from ...places import OpenFile, Place, arrow_source, identity, place
from ...processing.images import MAX_PIXELS
from ...processing.sample_error import SampleError
from .image_sizes import upright_size
from .tars import MAX_IMAGE_BYTES, Sample

logger = logging.getLogger(__name__)

_METADATA_KEY = b"open_qwen2vl"
FORMAT_VERSION = 2
_PLACES = [("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]
_SIZES = [("width", pa.int32()), ("height", pa.int32())]
SCHEMA = pa.schema([("key", pa.string()), ("uid", pa.string()), ("members", pa.list_(pa.struct([*_PLACES, *_SIZES])))])
_SCHEMA_1 = SCHEMA.set(2, pa.field("members", pa.list_(pa.struct(_PLACES))))
_HEADER = 512  # bytes of a member's header in a tar


def index_path(tar: Place) -> Place:
    """The index of `NAME.tar`: `NAME.index.parquet` beside it."""
    return tar.with_suffix(".index.parquet")


def write_shard_index(path: Place, table: pa.Table, tar_bytes: int) -> None:
    """Write an index, a table of `SCHEMA`, of a tar of so many bytes."""
    metadata = {_METADATA_KEY: json.dumps({"format_version": FORMAT_VERSION, "tar_bytes": tar_bytes})}
    with renamed_when_whole(path) as temporary:
        pq.write_table(table.cast(SCHEMA).replace_schema_metadata(metadata), temporary, compression="zstd")


def read_shard_index(tar: str | Place) -> tuple[list[Sample], list[str]] | None:
    """The samples of a tar by its index, in the order of the tar and without their spans, and their uids.

    `None` if there is no index, or one that is not of a tar of this size or damaged, which is logged.
    """
    path = index_path(place(tar))
    if not path.exists():
        return None
    try:
        table = _checked_table(path, identity(tar)["size"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(path)
            raise
        logger.warning("%s is not the index of %s: not used (%s)", path, tar, error)
        return None
    members = table["members"].combine_chunks()
    ends = np.cumsum(members.value_lengths()).tolist()
    extensions, offsets, sizes, *sides = (column.to_pylist() for column in members.flatten().flatten())
    locations = list(zip(offsets, sizes, strict=True))
    images = list(zip(*sides, strict=True))
    samples, start = [], 0
    for key, end in zip(table["key"].to_pylist(), ends, strict=True):
        own = extensions[start:end]
        known = {ext: size for ext, size in zip(own, images[start:end], strict=bool(images)) if size[0]}
        samples.append(Sample(key, dict(zip(own, locations[start:end], strict=True)), image_sizes=known))
        start = end
    return samples, table["uid"].to_pylist()


def _checked_table(path: Place, tar_bytes: int) -> pa.Table:
    """Key, uid and members of an index whose values can all be those of a tar of this size; else a ValueError."""
    with pq.ParquetFile(arrow_source(path)) as file:
        made = json.loads(file.schema_arrow.metadata[_METADATA_KEY])
        if made["tar_bytes"] != tar_bytes:
            raise ValueError("made for a tar of another size")
        schema = {1: _SCHEMA_1, FORMAT_VERSION: SCHEMA}.get(made.get("format_version", 1))
        if schema is None:
            raise ValueError(f"format version {made['format_version']}")
        if file.metadata.num_rows * _HEADER > tar_bytes:
            raise ValueError("more samples than fit into the tar")
        table = file.read(columns=schema.names, use_threads=False)
    table = table.cast(schema)
    table.validate(full=True)
    extensions, offsets, sizes, *sides = table["members"].combine_chunks().flatten().flatten()
    if any(column.null_count for column in (table["key"], table["uid"], table["members"], extensions, offsets, sizes)):
        raise ValueError("nulls in it")
    offsets, sizes = offsets.to_numpy(), sizes.to_numpy()
    # Compared without a sum, which may be above what int64 holds.
    if len(offsets) and not ((offsets >= _HEADER) & (sizes >= 0) & (sizes <= tar_bytes - offsets)).all():
        raise ValueError("members outside of the tar")
    if sides:
        widths, heights = (side.fill_null(0).to_numpy().astype(np.int64) for side in sides)
        if ((widths < 0) | (heights < 0) | ((widths == 0) != (heights == 0)) | (widths * heights > MAX_PIXELS)).any():
            raise ValueError("sizes that no image has")
    if not pc.all(pc.match_substring_regex(table["uid"], "^[0-9a-f]{32}$"), min_count=0).as_py():
        raise ValueError("uids that are none")
    if len(pc.unique(table["key"])) != len(table):
        raise ValueError("keys that come twice")
    return table


def member_image_size(file: OpenFile, offset: int, size: int) -> tuple[int, int] | None:
    """Upright width and height of an image in an open tar, from its header; None if that cannot be read."""
    size = min(size, MAX_IMAGE_BYTES)
    try:
        return upright_size(lambda limit: file.read_at(min(size, limit or size), offset))
    except SampleError:
        return None
