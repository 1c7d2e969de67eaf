"""Members of a zip by their locations, from its directory, one after the other.

`zipfile` holds half a kilobyte of memory for each member, and archives of images have millions. Its central directory
is a run of small records at the end of the file; here they are read as they come. Zip64, without which neither 65,536
members nor 4 GB fit, is followed; zips of several volumes are not.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from ...places import OpenFile, Place, open_stream
from ...processing.sample_error import SampleError

STORED, DEFLATED = 0, 8
_END = struct.Struct("<4s4H2LH")
_END_LOCATOR_64 = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_HEADER = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = (1 << 16) - 1
_FULL = (1 << 32) - 1  # what stands in place of a number that is in the zip64 field
_BUFFER = 1 << 20
_UTF8, _ENCRYPTED = 0x800, 1


def list_members(path: str | Place) -> Iterator[tuple[str, int, int]]:
    """Name, byte of the header and compressed size of each file; a `ValueError` for what cannot be read."""
    with io.BufferedReader(open_stream(path), _BUFFER) as file:
        start, entries, shift = _directory(path, file)
        size = file.seek(0, os.SEEK_END)
        file.seek(start)
        for _ in range(entries):
            entry = file.read(_ENTRY.size)
            if len(entry) < _ENTRY.size or entry[:4] != b"PK\1\2":
                raise ValueError(
                    f"{path}: not a zip, or a damaged one: its directory breaks off at byte {file.tell()}"
                )
            fields = _ENTRY.unpack(entry)
            flags, method, packed, plain, offset = fields[3], fields[4], fields[8], fields[9], fields[16]
            name = file.read(fields[10]).decode("utf-8" if flags & _UTF8 else "cp437", errors="surrogateescape")
            packed, offset = _widen(file.read(fields[11]), plain, packed, offset)
            if not 0 <= offset + shift <= size - packed:
                raise ValueError(f"{path}: not a zip, or a damaged one: {name} lies outside of it")
            file.seek(fields[12], os.SEEK_CUR)
            if name.endswith("/"):
                continue
            if method not in (STORED, DEFLATED) or flags & _ENCRYPTED:
                raise ValueError(f"{path}: {name} is encrypted or compressed in another way than deflate")
            yield name, offset + shift, packed


def read_zip_member(file: OpenFile, name: str, offset: int, size: int, most: int, limit: int | None = None) -> bytes:
    """Read a member, or about its first `limit` bytes, and make sure that it is still this one.

    Raises `moved_member`, or `corrupt_image` for what cannot be decompressed to at most `most` bytes.
    """
    block = file.read_at(_HEADER.size, offset)
    fields = _HEADER.unpack(block) if len(block) == _HEADER.size else (b"",)
    if fields[0] != b"PK\3\4":
        raise SampleError("moved_member", f"{name} is not at byte {offset} of the zip any more")
    name_size, extra_size = fields[9:]
    size = size if limit is None else min(size, limit)
    rest = file.read_at(name_size + extra_size + size, offset + _HEADER.size)
    found = rest[:name_size].decode("utf-8" if fields[2] & _UTF8 else "cp437", errors="surrogateescape")
    if found.removeprefix("./") != name or len(rest) < name_size + extra_size + size:
        raise SampleError("moved_member", f"{name} is not at byte {offset} of the zip any more")
    data = rest[name_size + extra_size :]
    return data if fields[3] == STORED else _inflate(name, data, most, limit)


def _directory(path: str | Place, file: BinaryIO) -> tuple[int, int, int]:
    """Where the directory starts, how many entries it has, and what its offsets lack if the zip has a prefix."""
    size = file.seek(0, os.SEEK_END)
    tail_start = max(0, size - _END.size - _LONGEST_COMMENT)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise ValueError(f"{path}: not a zip, or a damaged one: it has no directory at its end")
    *_, entries, length, offset, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    locator = tail[max(0, at - _END_LOCATOR_64.size) : at]
    if locator[:4] == b"PK\6\7":
        end = end - _END_LOCATOR_64.size - _END_64.size
        file.seek(max(0, end))
        record = file.read(_END_64.size)
        if record[:4] != b"PK\6\6" or len(record) < _END_64.size:
            raise ValueError(f"{path}: not a zip, or a damaged one: its zip64 record is none")
        *_, entries, length, offset = _END_64.unpack(record)
    if length > end:
        raise ValueError(f"{path}: not a zip, or a damaged one: its directory is larger than it")
    return end - length, entries, end - length - offset


def _widen(extra: bytes, plain: int, packed: int, offset: int) -> tuple[int, int]:
    """Compressed size and offset, from the zip64 field where they do not fit their own."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            field = extra[4 : 4 + length]
            wide = list(struct.unpack_from(f"<{len(field) // 8}Q", field))
            numbers = [wide.pop(0) if number == _FULL and wide else number for number in (plain, packed, offset)]
            _, packed, offset = numbers
        extra = extra[4 + length :]
    return packed, offset


def _inflate(name: str, data: bytes, most: int, limit: int | None) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(data, most if limit is None else limit)
    except zlib.error as error:
        raise SampleError("corrupt_image", f"{name}: {error}") from error
    if not inflater.eof and limit is None:
        raise SampleError("corrupt_image", f"{name} is cut off in the zip, or larger than {most} bytes")
    return content
