"""Members of zips, against `zipfile`: plain ones, zip64, prefixes, comments, damage."""

import io
import os
import zipfile

import pytest

from open_qwen2vl.data.storage.zips import list_members, read_zip_member
from open_qwen2vl.places import open_file
from open_qwen2vl.processing.sample_error import SampleError

CONTENT = {"a.jpg": b"x" * 5000, "sub/b.jpg": os.urandom(300), "\u00fc/\u4e2d.jpg": b"", "old caf\u00e9.jpg": b"1"}


def write(file, compression=zipfile.ZIP_DEFLATED, comment=b"", content=CONTENT):
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.mkdir("sub")
        for name, data in content.items():
            archive.writestr(name, data)
        archive.comment = comment


def read_all(path, limit=1 << 20):
    with open_file(path) as file:
        return {
            name: read_zip_member(file, name.removeprefix("./"), offset, size, limit)
            for name, offset, size in list_members(path)
        }


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("comment", [b"", b"PK\5\6 is not the end" + bytes(60_000)])
def test_members_are_those_of_zipfile(tmp_path, compression, comment):
    path = tmp_path / "a.zip"
    write(path, compression, comment if b"PK" not in comment else comment.replace(b"PK\5\6", b"PK "))
    assert read_all(path) == CONTENT


def test_a_stream_without_sizes_in_its_headers_and_a_prefix(tmp_path):
    class Stream(io.RawIOBase):
        """Cannot be sought, so that sizes stand behind the data."""

        def __init__(self):
            self.data = b""

        def writable(self):
            return True

        def write(self, data):
            self.data += bytes(data)
            return len(data)

    stream = Stream()
    write(stream)
    path = tmp_path / "a.zip"
    path.write_bytes(b"#!/bin/sh\n" + stream.data)
    assert read_all(path) == CONTENT


def test_more_members_than_16_bits_count(tmp_path):
    path = tmp_path / "a.zip"
    names = [f"{number}.jpg" for number in range(66_000)]
    write(path, content=dict.fromkeys(names, b""))
    assert [name for name, _, _ in list_members(path)] == names


def test_members_behind_4_gb(tmp_path):
    path = tmp_path / "a.zip"
    with open(path, "wb") as file:
        file.seek(5 << 30)  # a hole, which takes no space
        write(file)
    assert min(offset for _, offset, _ in list_members(path)) > 5 << 30
    assert read_all(path) == CONTENT


def test_damage(tmp_path):
    path = tmp_path / "a.zip"
    write(path)
    whole = path.read_bytes()
    places = {name: (offset, size) for name, offset, size in list_members(path)}
    for cut in (0, 10, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="a.zip: not a zip, or a damaged one: it has no directory"):
            list(list_members(path))
    path.write_bytes(whole.replace(b"PK\1\2", b"PK\1\3"))
    with pytest.raises(ValueError, match="its directory breaks off"):
        list(list_members(path))
    offset, size = places["a.jpg"]
    start = offset + 30 + len("a.jpg")
    for data, reason in (
        (whole[:start] + b"\xff" * size + whole[start + size :], "corrupt_image"),
        (whole.replace(b"PK\3\4", b"PK\3\5"), "moved_member"),
        (whole.replace(b"a.jpg", b"b.jpg"), "moved_member"),
        (whole[: start + size - 1], "moved_member"),
        (whole[: start - 20], "moved_member"),
    ):
        path.write_bytes(data)
        with open_file(path) as file, pytest.raises(SampleError) as caught:
            read_zip_member(file, "a.jpg", offset, size, 1 << 20)
        assert caught.value.reason == reason
    path.write_bytes(whole)
    with pytest.raises(SampleError, match="larger than 4999 bytes"):
        read_all(path, 4999)
