"""An index of a WebDataset tar: which samples it holds and where their bytes are, without reading the bytes.

A sample is the members with the same key: the path up to the first dot of its last part. What follows the dot is the
member's extension (`0001.jpg`, `0001.txt`).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ...places import OpenFile, Place, files_at, identities, is_remote, open_file
from ...processing.sample_error import SampleError
from .open_files import NOTHING, Span
from .tar_headers import BLOCK, DamagedTar, TarMember, padded_end, scan_tar, split_member_name

TAR_DAMAGE = ("truncated_tar", "corrupt_tar")
# Of a sample's members the first of these is its image.
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "avif", "tif", "tiff"),
    *("jp2", "j2k", "jpe", "jfif", "mpo", "ppm", "pgm", "ico", "tga"),
)
# Or its video, which counts where there are both: `frames` is what `extract-frames` writes.
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi", "frames")
ANIMATIONS = ("gif", "webp", "png")  # images that may move
MAX_IMAGE_BYTES = 256 << 20
MAX_VIDEO_BYTES = 2 << 30
MAX_TEXT_BYTES = 1 << 20  # some 250,000 tokens
MAX_JSON_BYTES = 64 << 20  # which may hold its images
# Members of a sample are read at once where no more lies between them, as its json does, and they are no larger.
MAX_GAP_BYTES = 16 << 10
MAX_SPAN_BYTES = 16 << 20
_LIMITS = {"txt": (MAX_TEXT_BYTES, "text_too_large"), "json": (MAX_JSON_BYTES, "record_too_large")}
_UID = re.compile("[0-9a-fA-F]{32}")
_UNSAFE_KEY = re.compile(r"^/|(^|/)\.\.(/|$)|[\ud800-\udfff]")  # absolute, climbing up, not UTF-8


@dataclass(slots=True)
class Sample:
    """One sample of a tar."""

    key: str  # path in the tar up to the first dot of the last part
    # byte offset and size of the data by lower-case extension
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    # first byte and that behind the last of the members with their headers and their padding, one span for members
    # that follow each other
    spans: list[tuple[int, int]] = field(default_factory=list)
    # upright width and height by extension, of what an index knows
    image_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(slots=True)
class ShardIndex:
    """What a tar holds."""

    samples: list[Sample] = field(default_factory=list)  # in the order in which they begin, each key once
    # key and reason of what is no sample: `duplicate_key`, `unsafe_name`, `truncated_tar` (the key is empty if no
    # sample was cut) or `corrupt_tar`
    skipped: list[tuple[str, str]] = field(default_factory=list)
    ignored_members: int = 0  # directories, links, devices and names without a key or an extension


def find_shards(paths: Iterable[str | Place]) -> list[Place]:
    """The tars that the given paths stand for.

    Args:
        paths (`Iterable[str | Place]`): tars, and folders that stand for their `*.tar` in sorted order.

    Returns:
        `list[Place]`: the tars in the order given.

    Raises:
        ValueError: if there are none, or a path does not exist, or a tar is named twice.
    """
    shards: list[Place] = []
    for path in paths:
        found = files_at(path, "*.tar")
        if not found:
            raise ValueError(f"{path}: no .tar file in this folder")
        shards.extend(found)
    if not shards:
        raise ValueError("no shards given: name at least one tar or a folder of tars")
    seen = set()
    remote = [shard for shard in shards if is_remote(shard)]
    gone = {shard for shard, known in zip(remote, identities(remote), strict=True) if known is None}
    for shard in shards:
        if shard in gone or not is_remote(shard) and not shard.is_file():
            raise ValueError(f"{shard}: {'no regular file' if shard.exists() else 'no such file'}")
        name = str(shard) if is_remote(shard) else shard.resolve()
        if name in seen:
            raise ValueError(f"{shard}: given twice")
        seen.add(name)
    return shards


def find_tars(paths: Iterable[str | Place]) -> list[Place]:
    """[`find_shards`] where nothing but tars can be read: another file is refused by its name."""
    tars = find_shards(paths)
    for tar in tars:
        if tar.suffix != ".tar":
            raise ValueError(f"{tar}: no .tar file (a compressed one has to be unpacked)")
    return tars


def index_shard(path: str | Place) -> ShardIndex:
    """Index an uncompressed tar (ustar, GNU or pax) by its headers.

    Members of one key that do not lie side by side are joined; where the key has such a member already, the first wins
    and the others are a duplicate. A tar that ends too early or is damaged keeps all samples that are whole before the
    place; the loss stands in `skipped` once, whatever its extent.
    """
    with open_file(path, whole=True) as file:
        return index_members(scan_tar(file))


def index_members(members: Iterator[TarMember]) -> ShardIndex:
    """[`index_shard`] of members as [`scan_tar`] gives them."""
    index, known = ShardIndex(), {}
    run = Sample("")  # members of one key that follow each other; joined when the next key begins
    try:
        for member in members:
            named = split_member_name(member.name)
            if named is None or member.name.endswith("/"):
                index.ignored_members += 1
                continue
            key, extension = named
            # An extension again is a duplicate of the sample, or the next of a tar that was joined to this one.
            if key != run.key or extension in run.members:
                _join(index, known, run)
                run = Sample(key)
            if member.is_file:
                run.members[extension] = (member.offset, member.size)
                _append_span(run.spans, member.start, padded_end(member.offset, member.size))
            else:
                index.ignored_members += 1
    except DamagedTar as damage:
        is_cut = damage.key == run.key and damage.extension not in run.members
        if not damage.key and run.key not in known and index.samples:
            is_cut = run.members.keys() < index.samples[-1].members.keys()  # between two of its members
            damage.key = run.key if is_cut else ""
        # A sample that lacks what comes behind the damage is not whole; one that ended before it is.
        if not is_cut:
            _join(index, known, run)
        index.skipped.append((_loggable(damage.key), damage.reason))
    else:
        _join(index, known, run)
    return index


def _join(index: ShardIndex, known: dict[str, Sample], run: Sample) -> None:
    """Add members that follow each other to the samples, as one more or to that of their key."""
    if not run.key:
        return
    sample = known.setdefault(run.key, run)
    if _UNSAFE_KEY.search(run.key):
        index.skipped.append((_loggable(run.key), "unsafe_name"))
    elif sample is run:
        index.samples.append(run)
    elif _kinds(sample) & _kinds(run) or not run.members:
        index.skipped.append((run.key, "duplicate_key"))
    else:
        sample.members |= run.members
        sample.spans += run.spans


def _kinds(sample: Sample) -> set[str]:
    return {"image" if ext in IMAGE_EXTENSIONS else ext for ext in sample.members}


def list_files(path: str | Place) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the files of any tar in order; a [`SampleError`] where it is damaged."""
    try:
        with open_file(path, whole=True) as file:
            yield from ((member.name, member.offset, member.size) for member in scan_tar(file) if member.is_file)
    except DamagedTar as damage:
        raise SampleError(damage.reason, f"{path}: {damage.reason} after {damage.key or 'its last file'}") from None


def read_together(file: OpenFile, first: tuple[int, int], others: Iterable[tuple[int, int]]) -> Span:
    """Bytes and headers of a member, by offset and size, and of those others that lie beside it; nothing without any.

    A read costs more than its bytes wherever a disk or a network is asked.
    """
    start, end = own = first[0] - BLOCK, sum(first)
    places = sorted((offset - BLOCK, offset + size) for offset, size in others)
    for low, high in places:
        if low >= end and low - end <= MAX_GAP_BYTES and high - start <= MAX_SPAN_BYTES:
            end = high
    for low, high in reversed(places):
        if high <= start and start - high <= MAX_GAP_BYTES and end - low <= MAX_SPAN_BYTES:
            start = low
    return NOTHING if (start, end) == own or start < 0 else Span(start, file.read_at(end - start, start))


def spans_of(members: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """First byte and that behind the last of members, by offset and size, with their headers; neighbours are one."""
    spans: list[tuple[int, int]] = []
    for low, high in sorted((max(0, offset - BLOCK), offset + size) for offset, size in members):
        if spans and low - spans[-1][1] <= MAX_GAP_BYTES:
            low, high = spans[-1][0], max(high, spans.pop()[1])
        spans.append((low, high))
    return spans


def read_member(
    file: OpenFile, name: str | Iterable[str], offset: int, size: int, limit: int | None = None, span: Span = NOTHING
) -> bytes:
    """Read a member's data, or its first `limit` bytes, and make sure that it is still this member's.

    `name` is its name, or those that it may have, in any case of letters; what is in `span` is not read again. Raises
    `moved_member`, or `text_too_large`, `record_too_large` or `image_too_large` unread.
    """
    names = (name,) if isinstance(name, str) else tuple(name)
    wanted = size if limit is None else min(size, limit)
    extension = names[0].rpartition(".")[2].lower()
    most, reason = _LIMITS.get(extension, (most_media_bytes(names[0]), "image_too_large"))
    if wanted > most:
        raise SampleError(reason, f"{names[0]} has {size:,} bytes, more than {most:,}")
    block = span.read(file, BLOCK + wanted, max(0, offset - BLOCK))
    if len(block) == BLOCK + wanted and _size_in_header(block) == size:
        found = block[:100].split(b"\0", 1)[0].lower()
        for one in names:
            if _may_be_named(found, one):
                return block[BLOCK:]
    raise SampleError("moved_member", f"{' or '.join(names)} is not at byte {offset} of the tar any more")


def most_media_bytes(name: str) -> int:
    """Bytes of an image or a video, by its name."""
    return MAX_VIDEO_BYTES if name.rpartition(".")[2].lower() in VIDEO_EXTENSIONS else MAX_IMAGE_BYTES


def read_json(file: OpenFile, sample: Sample) -> Any:
    """A sample's metadata from its open tar; `None` without a json, or with one that cannot be read."""
    if "json" not in sample.members:
        return None
    try:
        return json.loads(read_member(file, f"{sample.key}.json", *sample.members["json"]))
    except (ValueError, RecursionError):
        return None


def has_dotted_key(sample: Sample) -> bool:
    """Whether a sample lacks an image because of dots in the names: of `a.b.jpg` the key is `a`."""
    for ext in sample.members:
        if "." in ext and ext.rpartition(".")[2] in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS):
            return True
    return False


def sample_uid(metadata: Any, tar_name: str, key: str) -> str:
    """32 hex digits: the `uid` of the sample's json, else the first 128 bits of SHA-256 of `tar_name/key`."""
    uid = metadata.get("uid") if isinstance(metadata, dict) else None
    if isinstance(uid, str) and _UID.fullmatch(uid):
        return uid.lower()
    return hashlib.sha256(f"{tar_name}/{key}".encode()).hexdigest()[:32]


def has_bad_uid(metadata: Any) -> bool:
    """Whether a sample's json has a `uid` that is not 32 hex digits."""
    uid = metadata.get("uid") if isinstance(metadata, dict) else None
    return uid is not None and not (isinstance(uid, str) and _UID.fullmatch(uid))


def _append_span(spans: list[tuple[int, int]], start: int, end: int) -> None:
    if spans and spans[-1][1] == start:
        start = spans.pop()[0]
    spans.append((start, end))


def _loggable(key: str) -> str:
    return key.encode(errors="backslashreplace").decode()


def _size_in_header(header: bytes) -> int | None:
    try:
        return int(header[124:136].strip(b"\0 "), 8)
    except ValueError:
        return None


def _may_be_named(found: bytes, name: str) -> bool:
    """Whether a header of this name, in lower case, may be that of a member."""
    expected = name.encode(errors="surrogateescape").lower()
    # A longer or non-ASCII name stands in a block of its own; what is left of it here differs between tar writers.
    return found == expected[:100] or len(expected) > 100 or not expected.isascii()
