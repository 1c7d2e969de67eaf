"""The headers of a tar, one after the other, whatever they claim.

They are read here and not by `TarFile`, which ends silently at a damaged header and is four times slower; it still
parses whatever a plain header cannot say (long names, pax).
"""

import errno
import io
import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from ...places import LocalFile, OpenFile

BLOCK = 512
_ZEROS = bytes(BLOCK)
_WINDOW = 8 * BLOCK
_EXTENDED = (32 * BLOCK, 2048 * BLOCK)
_ZERO_CHUNK = 1 << 20


class TarMember(NamedTuple):
    """A member of a tar."""

    name: str
    is_file: bool
    start: int  # of its first header block
    offset: int
    size: int


class DamagedTar(Exception):
    """Where a tar cannot be followed any further; `key` and `extension` of the member there, if it has a name."""

    def __init__(self, reason: str, name: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.key, self.extension = split_member_name(name) or (name, "")


def split_member_name(name: str) -> tuple[str, str] | None:
    """Split a name into key, up to the first dot of its last part, and extension in lower case; None without both."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else None


def padded_end(offset: int, size: int) -> int:
    """Where the next header may begin: behind the padding of a member's last block."""
    return offset + -(-size // BLOCK) * BLOCK


def scan_tar(file: OpenFile) -> Iterator[TarMember]:
    """Members of an open tar in order; raises DamagedTar where it cannot be followed any further."""
    length = file.size
    offset, ended = 0, False
    window, start = b"", 0  # a text, its json and the headers around them are one read
    while offset < length:
        if offset + BLOCK > start + len(window):
            window, start = file.read_at(_WINDOW, offset), offset
        header = window[offset - start : offset - start + BLOCK]
        if header == _ZEROS:
            # Not the last word: tars that were joined with `cat` go on behind their end marks.
            offset, ended = _behind_zeros(file, offset, length), True
            continue
        if len(header) < BLOCK or not _has_valid_checksum(header):
            if ended:
                return
            raise DamagedTar("truncated_tar" if len(header) < BLOCK else "corrupt_tar")
        member, following = _parse(file, header, offset)
        if following > length:
            raise DamagedTar("truncated_tar", member.name)
        yield member
        offset, ended = following, False
    if not ended:
        raise DamagedTar("truncated_tar")


def _behind_zeros(file: OpenFile, offset: int, length: int) -> int:
    """The next block that is not zero, or the end; holes of a sparse file are not read."""
    while offset < length:
        try:
            if isinstance(file, LocalFile):
                offset = max(offset, os.lseek(file.fileno(), offset, os.SEEK_DATA) // BLOCK * BLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole
                return length
        chunk = file.read_at(_ZERO_CHUNK, offset)
        rest = len(chunk.lstrip(b"\0"))
        if rest or not chunk:
            return offset + (len(chunk) - rest) // BLOCK * BLOCK
        offset += len(chunk)
    return length


def _has_valid_checksum(header: bytes) -> bool:
    try:
        found = int(header[148:156].strip(b"\0 "), 8)
        # Most of a header is zeros, and a sum over bytes is slow.
        return found == sum(header.translate(None, b"\0")) - sum(header[148:156]) + 8 * ord(" ")
    except ValueError:
        return False


def _parse(file: OpenFile, header: bytes, offset: int) -> tuple[TarMember, int]:
    """The member whose header block is given, and the offset of the next header."""
    has_prefix = header[345] and header[257:263] == b"ustar\0"
    if header[156:157] in (b"0", b"\0") and not has_prefix:
        try:
            name, size = header[:100].split(b"\0", 1)[0].decode(), int(header[124:136].strip(b"\0 "), 8)
            if size >= 0:
                return TarMember(name, True, offset, offset + BLOCK, size), padded_end(offset + BLOCK, size)
        except ValueError:  # sizes above 8 GB are not octal, old names not UTF-8
            pass
    # Extended headers claim any size: no more than so much is read of them.
    for most in _EXTENDED:
        try:
            tar = tarfile.TarFile(fileobj=io.BytesIO(file.read_at(most, offset)), encoding="utf-8")
            info = tar.next()
        except OSError:
            raise
        except Exception:  # tarfile raises many kinds on damaged headers, RecursionError and OverflowError among them
            continue
        if info is not None and info.size >= 0 and tar.offset > 0:
            name = info.name + "/" if info.isdir() else info.name
            member = TarMember(
                name, info.isreg() and not info.issparse(), offset, offset + info.offset_data, info.size
            )
            return member, offset + tar.offset
    raise DamagedTar("truncated_tar")
