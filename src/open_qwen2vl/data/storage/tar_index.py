"""The index beside a tar, `00000.index.parquet` of `00000.tar`: what is in it, without walking its headers.

    key, uid    of each sample, in the order of the tar
    members     extension, byte offset and size of its files; of images also width and height, upright: after rotation
                by EXIF; null where the header cannot be read
    text        the bytes of its `txt`; null without one, and of one that is too large
    (metadata)  names of the fields of the first json files, which tell what the tar is

`reshard` writes it beside its tars and `pack` for the tars of others, in a folder of its own, so that a plan reads no
tar, whatever its budget. It is of a tar of the same size, and its texts hold for the very same file: reshard's has the
time of its tar (in a bucket it is not older), so that the same samples give the same bytes; pack's says which size and
time, or ETag, it is of. Where that differs, and in an older version, texts are read from the tar, and whoever reads a
member by it makes sure of the member's header.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...files import renamed_when_whole
from ...places import (
    LocalFile,
    OpenFile,
    Place,
    arrow_source,
    filesystem,
    identity,
    is_remote,
    open_file,
    place,
    remote_errors_named,
)
from ...processing.images import MAX_PIXELS
from ...processing.sample_error import SampleError
from .image_sizes import upright_size
from .tar_headers import TarMember, scan_tar, split_member_name
from .tars import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, MAX_TEXT_BYTES, Sample, index_members, read_json, sample_uid

logger = logging.getLogger(__name__)

_METADATA_KEY = b"open_qwen2vl"
FORMAT_VERSION = 3
_PLACES = [("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]
_SIZES = [("width", pa.int32()), ("height", pa.int32())]
_SCHEMA_2 = pa.schema(
    [("key", pa.string()), ("uid", pa.string()), ("members", pa.list_(pa.struct([*_PLACES, *_SIZES])))]
)
SCHEMA = _SCHEMA_2.append(pa.field("text", pa.binary()))
_SCHEMAS = {1: _SCHEMA_2.set(2, pa.field("members", pa.list_(pa.struct(_PLACES)))), 2: _SCHEMA_2, 3: SCHEMA}
_HEADER = 512  # bytes of a member's header in a tar
_READ_AHEAD = 8 << 20  # bytes that the system is asked for at a time, of a tar of this machine
LOOKED_AT = 64  # members of a tar among which one tells what the tar is


class TarIndex(NamedTuple):
    """What is in a tar."""

    samples: list[Sample]  # in the order of the tar, by an index without their spans
    uids: list[str]
    texts: list[bytes | None] | None  # of their captions; None where they have to be read from the tar
    skipped: list[tuple[str, str]] = []  # key and reason of what is no sample
    ignored_members: int = 0


def index_path(tar: Place) -> Place:
    """The index of `NAME.tar`: `NAME.index.parquet` beside it."""
    return tar.with_suffix(".index.parquet")


def index_elsewhere(folder: Place, tar: str | Place) -> Place:
    """The index of a tar of others in a folder: two tars of one name have two."""
    return folder / f"{place(tar).stem}-{hashlib.sha256(str(tar).encode()).hexdigest()[:12]}.index.parquet"


def write_shard_index(path: Place, table: pa.Table, tar_bytes: int, tar: Place | None = None, **made: Any) -> None:
    """Write an index, a table of `SCHEMA`, of a tar of so many bytes, whose time it gets; `made` stands in it too."""
    metadata = {_METADATA_KEY: json.dumps({"format_version": FORMAT_VERSION, "tar_bytes": tar_bytes, **made})}
    with renamed_when_whole(path) as temporary:
        pq.write_table(table.cast(SCHEMA).replace_schema_metadata(metadata), temporary, compression="zstd")
        if tar is not None and not is_remote(tar):
            os.utime(temporary, ns=(os.stat(tar).st_mtime_ns,) * 2)


def read_shard_index(tar: str | Place, path: Place | None = None) -> TarIndex | None:
    """What an index says of a tar, that beside it or another.

    `None` if there is no index, or one that is not of a tar of this size or damaged, which is logged.
    """
    path = path or index_path(place(tar))
    if not path.exists():
        return None
    try:
        now = identity(tar)
        table, made = _checked_table(path, now["size"])
        skipped = [(str(key), str(reason)) for key, reason in made.get("skipped", ())]
        ignored = int(made.get("ignored_members", 0))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(path)
            raise
        logger.warning("%s is not the index of %s: not used (%s)", path, tar, error)
        return None
    texts = None
    if "text" in table.column_names and _is_of_this_file(path, tar, now, made):
        texts = table["text"].to_pylist()
    return TarIndex(_samples(table), table["uid"].to_pylist(), texts, skipped, ignored)


def index_fields(tar: str | Place) -> list[list[str]] | None:
    """What [`field_names`] found in a tar, by the index beside it; None where none says it."""
    path = index_path(place(tar))
    try:
        made = json.loads(pq.read_schema(arrow_source(path)).metadata[_METADATA_KEY]) if path.exists() else {}
        now, fields = identity(tar), made.get("fields")
        is_right = isinstance(fields, list) and made["tar_bytes"] == now["size"]
        return fields if is_right and _is_of_this_file(path, tar, now, made) else None
    except (pa.ArrowException, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None  # whoever reads the index says why it cannot be used


def field_names(records: Iterable[Any]) -> list[list[str]]:
    """What an index says of the json files among the first `LOOKED_AT` members: each list of names once."""
    names = (tuple(one) for one in records if isinstance(one, dict))
    return [list(one) for one in dict.fromkeys(names)]


def make_shard_index(tar: str | Place, path: Place) -> TarIndex:
    """Read a tar from its beginning to its end, in large reads, and write its index to `path`."""
    before, name = identity(tar), place(tar).name
    with open_file(tar, whole=True) as file:
        looked_at = _Contents(file)
        index = index_members(looked_at.of(scan_tar(file)))
    uids, texts = [], []
    for sample in index.samples:
        found = {ext: looked_at.found.get(offset) for ext, (offset, _) in sample.members.items()}
        sample.image_sizes = {ext: size for ext, size in found.items() if is_image(ext) and size}
        uids.append(sample_uid(found.get("json"), name, sample.key))
        texts.append(found.get("txt"))
    made = {"skipped": index.skipped, "ignored_members": index.ignored_members, "of": before}
    made["fields"] = field_names(looked_at.records)
    if identity(tar) == before:  # else what was read is of no file that is still there
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard_index(path, index_table(index.samples, uids, texts), before["size"], **made)
    return TarIndex(index.samples, uids, texts, index.skipped, index.ignored_members)


class _Contents:
    """What an index needs of members beside their places, looked at as they come by."""

    def __init__(self, file: OpenFile):
        self._file, self._ahead = file, 0
        self.records: list[Any] = []  # of the first `LOOKED_AT` members
        self._files = 0
        self.found: dict[int, Any] = {}  # by their offset: bytes of a text, {uid} of a json, size of an image

    def of(self, members: Iterator[TarMember]) -> Iterator[TarMember]:
        """The members, each looked at."""
        for member in members:
            key, extension = split_member_name(member.name) or ("", "")
            self._files += member.is_file
            if isinstance(self._file, LocalFile) and member.offset > self._ahead:
                self._ahead = member.offset + _READ_AHEAD
                os.posix_fadvise(self._file.fileno(), member.offset, _READ_AHEAD, os.POSIX_FADV_WILLNEED)
            if member.is_file and (found := self._look(key, extension, member)) is not None:
                self.found[member.offset] = found
            yield member

    def _look(self, key: str, extension: str, member: TarMember) -> Any:
        if extension == "txt":
            return self._file.read_at(member.size, member.offset) if member.size <= MAX_TEXT_BYTES else None
        if extension == "json":
            content = read_json(self._file, Sample(key, {"json": (member.offset, member.size)}))
            self.records += [content] if self._files <= LOOKED_AT else []
            return {"uid": content.get("uid")} if isinstance(content, dict) else None
        return member_image_size(self._file, member.offset, member.size) if is_image(extension) else None


def index_table(samples: list[Sample], uids: list[str], texts: list[bytes | None]) -> pa.Table:
    """A table of `SCHEMA`."""
    members = [
        (ext, *location, *one.image_sizes.get(ext, (None, None)))
        for one in samples
        for ext, location in one.members.items()
    ]
    kind = SCHEMA.field("members").type.value_type
    columns = zip(*members, strict=True) if members else [()] * kind.num_fields
    places = pa.StructArray.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, kind, strict=True)], fields=list(kind)
    )
    starts = np.cumsum([0, *(len(one.members) for one in samples)]).astype(np.int32)
    keys = pa.array([one.key for one in samples], pa.string())
    columns = [
        keys,
        pa.array(uids, pa.string()),
        pa.ListArray.from_arrays(starts, places),
        pa.array(texts, pa.binary()),
    ]
    return pa.table(columns, SCHEMA.names).cast(SCHEMA)


def is_image(extension: str) -> bool:
    """Of `KEY.jpg`, and of the images of a document, as `KEY.0.jpg`."""
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def _is_of_this_file(path: Place, tar: str | Place, now: dict[str, Any], made: dict[str, Any]) -> bool:
    if "of" in made:
        return made["of"] == now
    if is_remote(tar) or is_remote(path):
        return is_remote(tar) and is_remote(path) and _modified(path) >= _modified(tar)
    return os.stat(path).st_mtime_ns == now["mtime_ns"]


def _modified(url: str | Place) -> datetime:
    with remote_errors_named(url):
        return filesystem(str(url)).modified(str(url))


def _samples(table: pa.Table) -> list[Sample]:
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
    return samples


def _checked_table(path: Place, tar_bytes: int) -> tuple[pa.Table, dict[str, Any]]:
    """An index whose values can all be those of a tar of this size, and its metadata; else a ValueError."""
    with pq.ParquetFile(arrow_source(path)) as file:
        made = json.loads(file.schema_arrow.metadata[_METADATA_KEY])
        if made["tar_bytes"] != tar_bytes:
            raise ValueError("made for a tar of another size")
        schema = _SCHEMAS.get(made.get("format_version", 1))
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
    return table, made


def member_image_size(file: OpenFile, offset: int, size: int) -> tuple[int, int] | None:
    """Upright width and height of an image in an open tar, from its header; None if that cannot be read."""
    size = min(size, MAX_IMAGE_BYTES)
    try:
        return upright_size(lambda limit: file.read_at(min(size, limit or size), offset))
    except SampleError:
        return None
