"""Indexes, zips and arrays that are damaged or made up: not used, or one line with the file's name."""

import json
import os
import random
import struct
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from open_qwen2vl.data.documents.records import RecordReader
from open_qwen2vl.data.storage import image_files
from open_qwen2vl.data.storage.image_files import ImageFiles, describe_images, index_archives
from open_qwen2vl.data.storage.tables import Columns
from open_qwen2vl.data.storage.tar_index import SCHEMA, index_path, read_shard_index, write_shard_index
from open_qwen2vl.data.storage.tars import index_shard
from open_qwen2vl.data.storage.uids import find_uids, read_uids
from open_qwen2vl.data.storage.zips import list_members, read_zip_member
from open_qwen2vl.places import open_file
from open_qwen2vl.processing.sample_error import SampleError


@pytest.fixture
def indexed(write_tar, sample):
    """A tar of three samples and the rows of its index."""
    tar = write_tar([member for key in "abc" for member in sample(key)])
    rows = [
        {"key": one.key, "uid": f"{n:032x}",
         "members": [{"ext": ext, "offset": place[0], "size": place[1],
                      **({"width": 8, "height": 8} if ext == "png" else {})} for ext, place in one.members.items()]}
        for n, one in enumerate(index_shard(tar).samples)
    ]  # fmt: skip
    return tar, rows


def change_member(field, value):
    return lambda rows: rows[1]["members"][0].update({field: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: None, None),
        *((change_member("offset", value), "outside") for value in (-1, 0, 511, 1 << 40, 2**63 - 1)),
        *((change_member("size", value), "outside") for value in (-1, 1 << 40, 2**63 - 1)),
        *((change_member(field, None), "nulls") for field in ("ext", "offset", "size")),
        *((change_member("width", value), "no image has") for value in (-1, 0, None, 1 << 30)),
        (lambda rows: rows[1].update(members=None), "nulls"),
        (lambda rows: rows[1].update(key=None), "nulls"),
        (lambda rows: rows[1].update(key="a"), "twice"),
        (lambda rows: rows[1].update(uid="A" * 32), "uids"),
        (lambda rows: rows[1].update(uid=None), "nulls"),
        (lambda rows: rows.extend([{**rows[0], "key": str(n)} for n in range(99)]), "more samples"),
    ],
)
def test_every_value_of_an_index_is_checked(indexed, caplog, change, reason):
    tar, rows = indexed
    change(rows)
    write_shard_index(index_path(tar), pa.Table.from_pylist(rows, SCHEMA), os.path.getsize(tar))
    found = read_shard_index(tar)
    if reason:
        assert found is None and reason in caplog.text and str(index_path(tar)) in caplog.text
    else:
        assert [one.members for one in found[0]] == [one.members for one in index_shard(tar).samples]


def test_a_damaged_index_is_not_used_or_names_members_of_the_tar(indexed):
    tar, rows = indexed
    write_shard_index(index_path(tar), pa.Table.from_pylist(rows, SCHEMA), os.path.getsize(tar))
    whole, dice = index_path(tar).read_bytes(), random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 3)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        index_path(tar).write_bytes(data[: dice.randrange(len(data))] if dice.random() < 0.2 else data)
        for one in (read_shard_index(tar) or [[]])[0]:
            assert all(offset + size <= os.path.getsize(tar) for offset, size in one.members.values())


def test_other_tables_and_metadata_are_no_index(indexed):
    tar, rows = indexed
    for metadata in (None, "{", "[]", json.dumps({"tar_bytes": "1"})):
        table = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata(metadata and {"open_qwen2vl": metadata})
        pq.write_table(table, index_path(tar))
        assert read_shard_index(tar) is None


def test_damaged_zips_are_one_line_or_reasons(tmp_path):
    path, dice = tmp_path / "a.zip", random.Random(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            archive.writestr(f"{number}.jpg", b"x" * 400)
    whole = path.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 3)):
            data[dice.randrange(len(data))] = dice.choice([0, 255, dice.randrange(256)])
        path.write_bytes(data[: dice.randrange(len(data))] if dice.random() < 0.2 else data)
        try:
            with open_file(path) as file:
                for name, offset, size in list_members(path):
                    try:
                        assert len(read_zip_member(file, name, offset, size, 1000)) <= 1000
                    except SampleError as error:
                        assert error.reason in ("moved_member", "corrupt_image")
        except ValueError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("record", [b"PK\6\6" + b"\xff" * 52, b"PK\6\6" + bytes(20), b"x" * 56, b""])
def test_zip64_records_that_are_none(tmp_path, record):
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1)
    (tmp_path / "a.zip").write_bytes(record + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 1, 1, 0))
    with pytest.raises(ValueError, match="a.zip: not a zip, or a damaged one"):
        list(list_members(tmp_path / "a.zip"))


def test_arrays_that_are_none_are_one_line(tmp_path):
    path, dice = tmp_path / "u.npy", random.Random(0)
    np.save(path, np.zeros(4, "u8,u8"))
    whole = path.read_bytes()
    contents = [b"", b"PK\3\4", whole[:70], whole[:10] + b"(" * 110 + b"\n" + bytes(64)]
    for _ in range(200):
        data = bytearray(whole)
        data[dice.randrange(120)] = dice.randrange(256)
        contents.append(bytes(data))
    for content in contents:
        path.write_bytes(content)
        try:
            assert read_uids(path).dtype == "u8,u8"
        except ValueError as error:
            assert str(path) in str(error)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: no regular file"):
        read_uids(tmp_path / "pipe")


def test_the_index_of_archives_is_written_whole_and_checked(write_tar, tmp_path, monkeypatch):
    tar = write_tar([(f"{n}.jpg", b"x" * (n + 1)) for n in range(5)])
    monkeypatch.setattr(image_files, "_SORTED_AT_ONCE", 2)
    roots = describe_images([tar], tmp_path)
    index_archives(tmp_path, roots)
    assert [ImageFiles(tmp_path, roots).find(f"{n}.jpg").size for n in range(5)] == [1, 2, 3, 4, 5]
    names = sorted(path.name for path in tmp_path.glob("image-index*"))
    assert names == ["image-index.0.key.npy", "image-index.0.location.npy"]
    np.save(tmp_path / "image-index.0.key.npy", np.zeros(3, "<u8"))
    with pytest.raises(ValueError, match="index of images is damaged"):
        ImageFiles(tmp_path, roots).find("1.jpg")
    (tmp_path / "image-index.0.key.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match="image-index.0.key.npy: not a whole"):
        ImageFiles(tmp_path, roots).find("1.jpg")


def test_a_mapped_array_that_is_cut_is_an_error_and_no_signal(tmp_path):
    path = tmp_path / "u.npy"
    np.save(path, np.array([(n, 0) for n in range(5000)], "u8,u8"))
    uids = read_uids(path)
    asked = np.array([4999], np.uint64), np.array([0], np.uint64)
    assert find_uids(uids, *asked).tolist() == [4999]
    os.truncate(path, 4096)
    with pytest.raises(OSError, match="u.npy has been cut since it was opened"):
        find_uids(uids, *asked)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_that_is_damaged_after_it_was_planned_costs_rows_and_no_run(tmp_path, suffix):
    table, path, dice = pa.table({"caption": ["a cat"] * 40}), tmp_path / f"a.{suffix}", random.Random(0)
    with pa.OSFile(str(path), "wb") as file:
        if suffix == "parquet":
            pq.write_table(table, file, row_group_size=10)
        else:
            with pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=10)
    whole, reasons = path.read_bytes(), set()
    document = {"shard": 0, "record": {"offset": None, "size": None, "row": 35}}
    for _ in range(60):
        path.write_bytes(whole[: dice.randrange(len(whole))])
        try:
            RecordReader([str(path)], "text", Columns(("caption",), ())).read(document)
        except SampleError as error:
            reasons.add(error.reason)
    assert reasons and reasons <= {"corrupt_table", "moved_row"}
