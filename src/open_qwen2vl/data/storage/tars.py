"""An index of a WebDataset tar: which samples it holds and where their bytes are, without reading the bytes.

A sample is the members with the same key: the path up to the first dot of its last part. What follows the dot is the
member's extension (`0001.jpg`, `0001.txt`). The headers are read here and not by `TarFile`, which ends silently at
a damaged header and is four times slower; it still parses whatever a plain header cannot say (long names, pax).
"""

import errno
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...processing.sample_error import SampleError
from .open_files import read_at

TAR_DAMAGE = ("truncated_tar", "corrupt_tar")
# Of a sample's members the first of these is its image.
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "avif", "tif", "tiff"),
    *("jp2", "j2k", "jpe", "jfif", "mpo", "ppm", "pgm", "ico", "tga"),
)
MAX_IMAGE_BYTES = 256 << 20
MAX_TEXT_BYTES = 1 << 20  # some 250,000 tokens
MAX_JSON_BYTES = 64 << 20  # which may hold its images
_LIMITS = {"txt": (MAX_TEXT_BYTES, "text_too_large"), "json": (MAX_JSON_BYTES, "record_too_large")}
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_WINDOW = 8 * _BLOCK
_EXTENDED = (32 * _BLOCK, 2048 * _BLOCK)
_ZERO_CHUNK = 1 << 20
_UID = re.compile("[0-9a-fA-F]{32}")
_UNSAFE_KEY = re.compile(r"^/|(^|/)\.\.(/|$)|[\ud800-\udfff]")  # absolute, climbing up, not UTF-8


@dataclass(slots=True)
class Sample:
    """One sample of a tar.

    Attributes:
        key (`str`): path in the tar up to the first dot of the last part.
        members (`dict[str, tuple[int, int]]`): byte offset and size of the data by lower-case extension.
        spans (`list[tuple[int, int]]`): first byte and that behind the last of the members with their headers and
            their padding, one span for members that follow each other.
    """

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    spans: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class ShardIndex:
    """What a tar holds.

    Attributes:
        samples (`list[Sample]`): in the order in which they begin, each key once.
        skipped (`list[tuple[str, str]]`): key and reason of what is no sample: `duplicate_key`, `unsafe_name`,
            `truncated_tar` (the key is empty if no sample was cut) or `corrupt_tar`.
        ignored_members (`int`): directories, links, devices and names without a key or an extension.
    """

    samples: list[Sample] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    ignored_members: int = 0


class _Member(NamedTuple):
    name: str
    is_file: bool
    start: int  # of its first header block
    offset: int
    size: int


class _DamagedTar(Exception):
    def __init__(self, reason: str, name: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.key, self.extension = split_member_name(name) or (name, "")


def find_shards(paths: Iterable[str | Path]) -> list[Path]:
    """The tars that the given paths stand for.

    Args:
        paths (`Iterable[str | Path]`): tars, and folders that stand for their `*.tar` in sorted order.

    Returns:
        `list[Path]`: the tars in the order given.

    Raises:
        ValueError: if there are none, or a path does not exist, or a tar is named twice.
    """
    shards: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: no .tar file in this folder")
        shards.extend(found)
    if not shards:
        raise ValueError("no shards given: name at least one tar or a folder of tars")
    seen = set()
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{shard}: {'no regular file' if shard.exists() else 'no such file'}")
        if shard.resolve() in seen:
            raise ValueError(f"{shard}: given twice")
        seen.add(shard.resolve())
    return shards


def index_shard(path: str | Path) -> ShardIndex:
    """Index an uncompressed tar (ustar, GNU or pax) by its headers.

    Members of one key that do not lie side by side are joined; where the key has such a member already, the first wins
    and the others are a duplicate. A tar that ends too early or is damaged keeps all samples that are whole before the
    place; the loss stands in `skipped` once, whatever its extent.
    """
    index, known = ShardIndex(), {}
    run = Sample("")  # members of one key that follow each other
    try:
        for member in _scan(path):
            named = split_member_name(member.name)
            if named is None or member.name.endswith("/"):
                index.ignored_members += 1
                continue
            key, extension = named
            if key != run.key or extension in run.members:
                _join(index, known, run)
                run = Sample(key)
            if member.is_file:
                run.members[extension] = (member.offset, member.size)
                _append_span(run.spans, member.start, padded_end(member.offset, member.size))
            else:
                index.ignored_members += 1
    except _DamagedTar as damage:
        is_cut = damage.key == run.key and damage.extension not in run.members
        if not damage.key and run.key not in known and index.samples:
            is_cut = run.members.keys() < index.samples[-1].members.keys()  # between two of its members
            damage.key = run.key if is_cut else ""
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


def list_files(path: str | Path) -> Iterator[tuple[str, int, int]]:
    """The files of a tar that is no set of samples.

    Args:
        path (`str | Path`): an uncompressed tar.

    Yields:
        `tuple[str, int, int]`: name, byte offset and size of each file's data, in the order of the tar.

    Raises:
        SampleError: `truncated_tar` or `corrupt_tar`, where it cannot be followed any further.
        OSError: if it cannot be read.
    """
    try:
        yield from ((member.name, member.offset, member.size) for member in _scan(path) if member.is_file)
    except _DamagedTar as damage:
        raise SampleError(damage.reason, f"{path}: {damage.reason} after {damage.key or 'its last file'}") from None


def split_member_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and extension.

    Args:
        name (`str`): path in the tar.

    Returns:
        `tuple[str, str]`: the path up to the first dot of its last part and the rest in lower case; `None` if either
        is empty (hidden files, files without an extension).
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else None


def read_member(file: int, name: str | Iterable[str], offset: int, size: int, limit: int | None = None) -> bytes:
    """Read a member's data, or its first `limit` bytes, and make sure that it is still this member's.

    Args:
        file (`int`): descriptor of the open tar.
        name (`str` or `Iterable[str]`): the member's name, or those that it may have; case is not told apart.
        offset (`int`): first byte of its data, which its header block precedes.
        size (`int`): bytes of its data.
        limit (`int`, *optional*): most bytes that are read.

    Returns:
        `bytes`: the data.

    Raises:
        SampleError: `moved_member` if another header or nothing stands there; `text_too_large`, `record_too_large` or
            `image_too_large` if it is larger than its kind may be, which is found out unread.
    """
    names = [name] if isinstance(name, str) else list(name)
    wanted = size if limit is None else min(size, limit)
    most, reason = _LIMITS.get(names[0].rpartition(".")[2].lower(), (MAX_IMAGE_BYTES, "image_too_large"))
    if wanted > most:
        raise SampleError(reason, f"{names[0]} has {size:,} bytes, more than {most:,}")
    block = read_at(file, _BLOCK + wanted, max(0, offset - _BLOCK))
    if len(block) != _BLOCK + wanted or not any(_is_header_of(block[:_BLOCK], one, size) for one in names):
        raise SampleError("moved_member", f"{' or '.join(names)} is not at byte {offset} of the tar any more")
    return block[_BLOCK:]


def read_json(file: int, sample: Sample) -> Any:
    """A sample's metadata from the descriptor of its tar; `None` without a json, or with one that cannot be read."""
    if "json" not in sample.members:
        return None
    try:
        return json.loads(read_member(file, f"{sample.key}.json", *sample.members["json"]))
    except (ValueError, RecursionError):
        return None


def has_dotted_key(sample: Sample) -> bool:
    """Whether a sample lacks an image because of dots in the names: of `a.b.jpg` the key is `a`."""
    return any("." in ext and ext.rpartition(".")[2] in IMAGE_EXTENSIONS for ext in sample.members)


def sample_uid(metadata: Any, tar_name: str, key: str) -> str:
    """The 128-bit name of a sample.

    Args:
        metadata (`Any`): the sample's parsed json, or `None`.
        tar_name (`str`): file name of the tar.
        key (`str`): key of the sample.

    Returns:
        `str`: 32 lower-case hex digits: the json's `uid` where it has such a one, else the first 128 bits of SHA-256
        of `tar_name/key`.
    """
    uid = metadata.get("uid") if isinstance(metadata, dict) else None
    if isinstance(uid, str) and _UID.fullmatch(uid):
        return uid.lower()
    return hashlib.sha256(f"{tar_name}/{key}".encode()).hexdigest()[:32]


def has_bad_uid(metadata: Any) -> bool:
    """Whether a sample names itself by something else than a uid.

    Args:
        metadata (`Any`): the sample's parsed json, or `None`.

    Returns:
        `bool`: whether the json has a `uid` that is not 32 hex digits.
    """
    uid = metadata.get("uid") if isinstance(metadata, dict) else None
    return uid is not None and not (isinstance(uid, str) and _UID.fullmatch(uid))


def padded_end(offset: int, size: int) -> int:
    """Where the next header may begin.

    Args:
        offset (`int`): first byte of a member's data.
        size (`int`): its bytes.

    Returns:
        `int`: the byte behind the padding that fills its last block.
    """
    return offset + -(-size // _BLOCK) * _BLOCK


def _append_span(spans: list[tuple[int, int]], start: int, end: int) -> None:
    if spans and spans[-1][1] == start:
        start = spans.pop()[0]
    spans.append((start, end))


def _scan(path: str | Path) -> Iterator[_Member]:
    """Members in order; raises _DamagedTar where the tar cannot be followed any further."""
    with open(path, "rb", buffering=0) as raw:
        file = raw.fileno()
        length = os.fstat(file).st_size
        offset, ended = 0, False
        window, start = b"", 0  # a text, its json and the headers around them are one read
        while offset < length:
            if offset + _BLOCK > start + len(window):
                window, start = read_at(file, _WINDOW, offset), offset
            header = window[offset - start : offset - start + _BLOCK]
            if header == _ZEROS:
                # Not the last word: tars that were joined with `cat` go on behind their end marks.
                offset, ended = _behind_zeros(file, offset, length), True
                continue
            if len(header) < _BLOCK or not _has_valid_checksum(header):
                if ended:
                    return
                raise _DamagedTar("truncated_tar" if len(header) < _BLOCK else "corrupt_tar")
            member, following = _parse(file, header, offset)
            if following > length:
                raise _DamagedTar("truncated_tar", member.name)
            yield member
            offset, ended = following, False
        if not ended:
            raise _DamagedTar("truncated_tar")


def _behind_zeros(file: int, offset: int, length: int) -> int:
    """The next block that is not zero, or the end; holes of a sparse file are not read."""
    while offset < length:
        try:
            offset = max(offset, os.lseek(file, offset, os.SEEK_DATA) // _BLOCK * _BLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole
                return length
        chunk = read_at(file, _ZERO_CHUNK, offset)
        rest = len(chunk.lstrip(b"\0"))
        if rest or not chunk:
            return offset + (len(chunk) - rest) // _BLOCK * _BLOCK
        offset += len(chunk)
    return length


def _has_valid_checksum(header: bytes) -> bool:
    try:
        found = int(header[148:156].strip(b"\0 "), 8)
        # Most of a header is zeros, and a sum over bytes is slow.
        return found == sum(header.translate(None, b"\0")) - sum(header[148:156]) + 8 * ord(" ")
    except ValueError:
        return False


def _parse(file: int, header: bytes, offset: int) -> tuple[_Member, int]:
    """The member whose header block is given, and the offset of the next header."""
    has_prefix = header[345] and header[257:263] == b"ustar\0"
    if header[156:157] in (b"0", b"\0") and not has_prefix:
        try:
            name, size = header[:100].split(b"\0", 1)[0].decode(), int(header[124:136].strip(b"\0 "), 8)
            if size >= 0:
                return _Member(name, True, offset, offset + _BLOCK, size), padded_end(offset + _BLOCK, size)
        except ValueError:  # sizes above 8 GB are not octal, old names not UTF-8
            pass
    # Extended headers claim any size: no more than so much is read of them.
    for most in _EXTENDED:
        try:
            tar = tarfile.TarFile(fileobj=io.BytesIO(read_at(file, most, offset)), encoding="utf-8")
            info = tar.next()
        except OSError:
            raise
        except Exception:  # tarfile raises many kinds on damaged headers, RecursionError and OverflowError among them
            continue
        if info is not None and info.size >= 0 and tar.offset > 0:
            name = info.name + "/" if info.isdir() else info.name
            member = _Member(name, info.isreg() and not info.issparse(), offset, offset + info.offset_data, info.size)
            return member, offset + tar.offset
    raise _DamagedTar("truncated_tar")


def _loggable(key: str) -> str:
    return key.encode(errors="backslashreplace").decode()


def _is_header_of(header: bytes, name: str, size: int) -> bool:
    expected = name.encode(errors="surrogateescape").lower()
    found = header[:100].split(b"\0", 1)[0].lower()
    try:
        if int(header[124:136].strip(b"\0 "), 8) != size:
            return False
    except ValueError:
        return False
    # A longer or non-ASCII name stands in a block of its own; what is left of it here differs between tar writers.
    return found == expected[:100] or len(expected) > 100 or not expected.isascii()
