import io
import os
import struct
import tempfile

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.packing.plan_files import read_part_metadata
from open_qwen2vl.data.resharding.options import ReshardOptions
from open_qwen2vl.data.resharding.resharding import reshard
from open_qwen2vl.data.storage.tar_index import index_path, member_image_size, read_shard_index, write_shard_index
from open_qwen2vl.data.storage.uids import UID_DTYPE, write_uids
from tests.data.packing.test_plan import read_bytes, read_rows

OPTIONS = {"image_seq_length": 4, "max_length": 128, "num_workers": 1}


def size_of(data):
    with tempfile.TemporaryFile() as file:
        file.write(b"before" + data + b"behind")
        file.flush()
        return member_image_size(file.fileno(), 6, len(data))


FORMATS = [
    ("PNG", {}),
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("JPEG", {"exif": b"Exif\0\0" + bytes(60_000)}),  # the size stands behind it, far from the beginning
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
]


@pytest.mark.parametrize(("image_format", "options"), FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_image_sizes_are_those_of_the_decoder(encode, image_format, options, mode):
    image = Image.new(mode if image_format == "JPEG" or mode == "L" else "RGB", (37, 11))
    assert size_of(encode(image, image_format, **options)) == (37, 11)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_images_have_the_decoders_size_or_none(data):
    image_format, options = data.draw(st.sampled_from(FORMATS))
    buffer = io.BytesIO()
    Image.new("RGB", (9, 5), "red").save(buffer, image_format, **options)
    content = bytearray(buffer.getvalue())
    place = data.draw(st.integers(0, min(len(content), 700) - 1))
    content[place] = data.draw(st.integers(0, 255))
    found = size_of(bytes(content[: data.draw(st.integers(0, len(content)))]))
    assert found is None or len(found) == 2 and all(side >= 0 for side in found)


def test_header_without_an_image_is_no_size():
    assert size_of(b"") is None and size_of(b"\xff\xd8") is None and size_of(b"GIF89a") is None
    assert size_of(b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", 0, 7) + bytes(20)) is None


@pytest.fixture
def resharded(make_tar, sample, encode, tmp_path):
    """A tar of thirty samples with its index, one of them without an image that can be read."""
    members = []
    for number in range(30):
        image = b"broken" if number == 7 else encode(Image.new("RGB", (number + 1, 5)))
        members += sample(f"{number:03d}", f"cat {number} " * (number % 5 + 1), image, f"{number:032x}")
    members += sample("latin1", "caf\xe9".encode("latin-1"), uid=f"{30:032x}")
    write_uids(tmp_path / "subset.npy", np.array([(0, number) for number in range(31)], UID_DTYPE))
    tar = make_tar(tmp_path / "pool.tar", members)
    reshard(ReshardOptions([tar], tmp_path / "subset.npy", tmp_path / "out", num_workers=1))
    return tmp_path / "out/00000.tar"


def test_image_sizes_stand_in_the_index(resharded):
    table = pa.parquet.read_table(index_path(resharded)).to_pydict()
    sizes = list(zip(table["width"], table["height"], strict=True))
    assert sizes[:7] == [(n + 1, 5) for n in range(7)] and sizes[7] == (None, None) and sizes[30] == (8, 8)


def test_pack_plans_the_same_by_index_and_by_headers(resharded, tmp_path, tokenizer, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("open_qwen2vl.data.documents.records.index_shard", None)  # whoever walks the headers fails
        plan_packs([resharded], tmp_path / "by-index", tokenizer, **OPTIONS)
    index_path(resharded).unlink()
    plan_packs([resharded], tmp_path / "by-header", tokenizer, **OPTIONS)
    assert read_bytes(tmp_path / "by-index") == read_bytes(tmp_path / "by-header")
    report = read_part_metadata(tmp_path / "by-index/part-00000.parquet")["report"]
    assert (report["documents"], report["skipped"]) == (30, {"bad_caption_encoding": 1})


def test_the_index_keeps_the_uid_that_a_sample_had(make_tar, sample, tmp_path, tokenizer):
    """One that is made of the first tar's name, where no json has one."""
    from open_qwen2vl.data.storage.tars import sample_uid

    uid = sample_uid(None, "pool.tar", "a")
    write_uids(tmp_path / "subset.npy", np.array([(int(uid[:16], 16), int(uid[16:], 16))], UID_DTYPE))
    reshard(
        ReshardOptions(
            [make_tar(tmp_path / "pool.tar", sample("a"))], tmp_path / "subset.npy", tmp_path / "out", num_workers=1
        )
    )
    plan_packs([tmp_path / "out/00000.tar"], tmp_path / "packs", tokenizer, **OPTIONS)
    ((document,),) = (row["documents"] for row in read_rows(tmp_path / "packs", "part"))
    assert document["uid"] == uid


@pytest.mark.parametrize("damage", ["garbage", "other size", "other tar"])
def test_an_index_that_does_not_fit_is_not_used(resharded, make_tar, sample, tmp_path, tokenizer, caplog, damage):
    plan_packs([resharded], tmp_path / "right", tokenizer, **OPTIONS)
    index = index_path(resharded)
    if damage == "garbage":
        index.write_bytes(b"PAR1 and more")
    else:
        size = os.path.getsize(resharded) + (damage == "other size")
        table = pa.parquet.read_table(index)
        if damage == "other tar":
            keys = pa.array([f"x{key}" for key in table["key"].to_pylist()])
            table = table.set_column(0, "key", keys)
        write_shard_index(index, table, size)
    assert (read_shard_index(resharded) is None) == (damage != "other tar")
    plan_packs([resharded], tmp_path / "packs", tokenizer, **OPTIONS)
    assert "not used" in caplog.text
    assert read_bytes(tmp_path / "packs") == read_bytes(tmp_path / "right")
