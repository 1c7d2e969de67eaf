import io
import json
import os
import struct
import tempfile
from collections import Counter

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
from open_qwen2vl.data.storage.tars import index_shard, read_json, sample_uid
from open_qwen2vl.data.storage.uids import UID_DTYPE, parse_uid, write_uids
from open_qwen2vl.families import register_family
from open_qwen2vl.places import LocalFile, open_file
from open_qwen2vl.processing.images import decode_image, read_image_size
from open_qwen2vl.processing.sample_error import SampleError
from tests.data.conftest import encode_image, write
from tests.data.packing.test_plan import read_bytes
from tests.documents import plan_rows
from tests.families.toy_family import ToyDocuments, ToyProcessor

OPTIONS = {"image_seq_length": 4, "max_length": 128, "num_workers": 1}


def size_of(data):
    with tempfile.NamedTemporaryFile() as whole:
        whole.write(b"before" + data + b"behind")
        whole.flush()
        file = open_file(whole.name)
        return member_image_size(file, 6, len(data))


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


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
@pytest.mark.parametrize("turn", range(10))
def test_sizes_are_upright(encode, image_format, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(Image.new("RGB", (37, 11), "red"), image_format, exif=exif)
    assert size_of(data) == decode_image(data).size == ((11, 37) if turn in (5, 6, 7, 8) else (37, 11))


def test_a_turn_behind_the_size_or_in_xmp_counts(encode):
    plain = encode(Image.new("RGB", (37, 11), "red"), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes()
    segment = b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content
    scan = plain.index(b"\xff\xda")
    assert size_of(plain[:scan] + segment + plain[scan:]) == (11, 37)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"/>'
    segment = b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp
    data = plain[:2] + segment + plain[2:]
    assert size_of(data) == read_image_size(data, upright=True)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_images_have_the_decoders_size_where_it_has_one(data):
    image_format, options = data.draw(st.sampled_from(FORMATS))
    buffer = io.BytesIO()
    Image.new("RGB", (9, 5), "red").save(buffer, image_format, **options)
    content = bytearray(buffer.getvalue())
    place = data.draw(st.integers(0, min(len(content), 700) - 1))
    content[place] = data.draw(st.integers(0, 255))
    damaged = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert size_of(damaged) == read_image_size(damaged, upright=True)
    except SampleError:
        pass  # what has a size all the same is dropped when it is read


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
    samples = read_shard_index(resharded).samples
    sizes = [sample.image_sizes for sample in samples]
    assert sizes[:7] == [{"png": (n + 1, 5)} for n in range(7)] and sizes[7] == {} and sizes[30] == {"png": (8, 8)}


def write_index_1(tar):
    """The index of format version 1, whose sizes are those of before rotation."""
    table = pa.parquet.read_table(index_path(tar)).to_pylist()
    for row in table:
        row["members"] = [{name: one[name] for name in ("ext", "offset", "size")} for one in row["members"]]
        row |= {"width": 3, "height": 3}
    members = pa.list_(pa.struct([("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]))
    sides = [("width", pa.int32()), ("height", pa.int32())]
    schema = pa.schema([("key", pa.string()), ("uid", pa.string()), ("members", members), *sides])
    metadata = {"open_qwen2vl": json.dumps({"tar_bytes": os.path.getsize(tar)})}
    pa.parquet.write_table(pa.Table.from_pylist(table, schema.with_metadata(metadata)), index_path(tar))


def test_an_older_index_is_used_but_for_its_sizes(resharded):
    samples, uids = read_shard_index(resharded)[:2]
    write_index_1(resharded)
    old, old_uids = read_shard_index(resharded)[:2]
    assert old_uids == uids and [one.members for one in old] == [one.members for one in samples]
    assert not any(one.image_sizes for one in old)


def picture(number):
    """Of its own size, every third turned by EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6 if number % 3 == 0 else 1
    return encode_image(Image.new("RGB", (8 * (number + 1), 16), "red"), "JPEG", exif=exif)


def caption_members():
    for number in range(9):
        yield f"{number}.jpg", picture(number)
        yield f"{number}.txt", b"a cat"


def document_members():
    """Two images in the folder of their document's key, one of a name of its own."""
    for number in range(6):
        texts = {"texts": [None, "a cat", None, "and a dog"], "images": ["0.jpg", None, "1.jpg", None]}
        yield f"{number}.json", json.dumps({**texts, "uid": f"{number:032x}"}).encode()
        yield f"{number}.0.jpg", picture(number)
        yield f"{number}.1.jpg", picture(2 * number)


@pytest.mark.parametrize("make", [caption_members, document_members])
def test_plans_over_resharded_tars_open_no_image(make, tokenizer, tmp_path):
    """The pictures are gone after resharding, and two plans of different budgets are what they were before."""
    register_family("ToyProcessor", ToyDocuments, "toy")
    pool = write(tmp_path / "pool.tar", list(make()))
    uids = [sample_uid(read_json(file, one), pool.name, one.key) for file in [open_file(pool)]
            for one in index_shard(pool).samples]  # fmt: skip
    write_uids(tmp_path / "subset.npy", np.sort(np.array([parse_uid(uid) for uid in uids], UID_DTYPE)))
    reshard(ReshardOptions([pool], tmp_path / "subset.npy", tmp_path / "out", num_workers=1))
    tar, options = tmp_path / "out/00000.tar", {"max_length": 128, "num_workers": 1}
    index = index_path(tar).read_bytes()

    def plan(name, most):
        plan_packs([tar], tmp_path / name, ToyProcessor(tokenizer, most), **options)
        return [without_uids(row) for kind in ("part", "skipped") for row in plan_rows(tmp_path / name, kind)]

    index_path(tar).unlink()
    by_header = [plan("header-64", 64), plan("header-9", 9)]
    index_path(tar).write_bytes(index)
    data, times = tar.read_bytes(), (tar.stat().st_atime_ns, tar.stat().st_mtime_ns)
    for _, content in make():
        data = data.replace(content, bytes(len(content))) if content[:2] == b"\xff\xd8" else data
    assert b"\xff\xd8" not in data
    tar.write_bytes(data)
    os.utime(tar, ns=times)
    assert [plan("index-64", 64), plan("index-9", 9)] == by_header
    assert by_header[0] != by_header[1] and any("too_many_patches" in row.values() for row in by_header[1])
    write_index_1(tar)
    with pytest.raises(ValueError, match="corrupt_image"):
        plan("index-1", 64)


def without_uids(row):
    """Of tars without uids these are made of the first tar's name, which an index alone knows."""
    documents = [{**one, "uid": None} for one in row.get("documents", ())]
    return {**row, "documents": documents} if documents else row


def test_the_index_of_another_tar_of_documents_is_not_used(tokenizer, tmp_path, caplog):
    members = list(document_members())
    tars = [write(tmp_path / f"{name}.tar", own) for name, own in (("a", members), ("b", members[::-1]))]
    uids = np.array([(0, number) for number in range(6)], UID_DTYPE)
    write_uids(tmp_path / "subset.npy", uids)
    for tar in tars:
        reshard(ReshardOptions([tar], tmp_path / "subset.npy", tmp_path / tar.stem, num_workers=1))
    tar, other = tmp_path / "a/00000.tar", tmp_path / "b/00000.tar"
    plan_packs([tar], tmp_path / "right", tokenizer, **OPTIONS)
    index_path(tar).write_bytes(index_path(other).read_bytes())
    assert os.path.getsize(tar) == os.path.getsize(other)
    plan_packs([tar], tmp_path / "packs", tokenizer, **OPTIONS)
    assert "index is that of another tar" in caplog.text
    assert read_bytes(tmp_path / "packs") == read_bytes(tmp_path / "right")


def test_pack_plans_the_same_by_index_and_by_headers(resharded, tmp_path, tokenizer, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(
            "open_qwen2vl.data.documents.records.make_shard_index", None
        )  # whoever walks the headers fails
        plan_packs([resharded], tmp_path / "by-index", tokenizer, **OPTIONS)
    index_path(resharded).unlink()
    plan_packs([resharded], tmp_path / "by-header", tokenizer, **OPTIONS)
    assert read_bytes(tmp_path / "by-index") == read_bytes(tmp_path / "by-header")
    report = read_part_metadata(tmp_path / "by-index/part-00000.arrow")["report"]
    assert (report["documents"], report["skipped"]) == (30, {"bad_caption_encoding": 1})


def test_the_index_keeps_the_uid_that_a_sample_had(make_tar, sample, tmp_path, tokenizer):
    """One that is made of the first tar's name, where no json has one."""
    uid = sample_uid(None, "pool.tar", "a")
    write_uids(tmp_path / "subset.npy", np.array([(int(uid[:16], 16), int(uid[16:], 16))], UID_DTYPE))
    reshard(
        ReshardOptions(
            [make_tar(tmp_path / "pool.tar", sample("a"))], tmp_path / "subset.npy", tmp_path / "out", num_workers=1
        )
    )
    plan_packs([tmp_path / "out/00000.tar"], tmp_path / "packs", tokenizer, **OPTIONS)
    ((document,),) = (row["documents"] for row in plan_rows(tmp_path / "packs", "part"))
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


@pytest.fixture
def tar_reads(monkeypatch):
    """Bytes that are read of each tar."""
    read, plain = Counter(), LocalFile.read_at

    def counted(self, size, offset):
        content = plain(self, size, offset)
        read[os.path.basename(self.name)] += len(content)
        return content

    monkeypatch.setattr(LocalFile, "read_at", counted)
    return read


def test_a_plan_over_resharded_tars_reads_indexes_alone(resharded, tmp_path, tokenizer, tar_reads):
    plan_packs([resharded], tmp_path / "packs", tokenizer, **OPTIONS)
    assert not tar_reads and not (tmp_path / "packs_indexes").exists()
    os.utime(resharded)
    plan_packs([resharded], tmp_path / "again", tokenizer, **OPTIONS)
    assert tar_reads["00000.tar"] > 31 * 512
    assert [plan_rows(tmp_path / name, "part") for name in ("packs", "again")][0] == plan_rows(
        tmp_path / "again", "part"
    )


def test_the_second_plan_over_foreign_tars_reads_indexes_alone(
    make_tar, sample, encode, tmp_path, tokenizer, tar_reads
):
    """Bad samples, a cut tar and members that are no sample are the same by the index that the first plan wrote."""
    tars, uid = [], f"{7:032x}"
    for name in ("a", "b"):
        members = [*sample(f"{name}1", "a cat", encode(Image.new("RGB", (9, 5))), uid), ("folder/", b""), ("x", b"?")]
        members += [*sample("dog", "a dog"), ("dog.txt", b"again"), ("none.txt", b"no image"), ("bad.png", b"x")]
        tars.append(make_tar(tmp_path / f"{name}.tar", [*members, ("bad.txt", b"caf\xe9"), *sample("last", "a fox")]))
    os.truncate(tars[1], index_shard(tars[1]).samples[-1].members["txt"][0])
    folders = [tmp_path / name for name in ("first", "second", "third")]
    reports = [plan_packs(tars, folders[0], tokenizer, **OPTIONS)]
    assert len(list((tmp_path / "first_indexes").iterdir())) == 2
    reads = []
    for folder in folders[1:]:
        tar_reads.clear()
        reports.append(plan_packs(tars, folder, tokenizer, indexes=str(tmp_path / "first_indexes"), **OPTIONS))
        reads.append(sum(tar_reads.values()))
        os.utime(tars[0])
        (folder / "plan.json").rename(folder / "old")
    assert reports[0] == reports[1] == reports[2] and reports[0].skipped.keys() >= {"truncated_tar", "missing_image"}
    assert plan_rows(folders[0], "part") == plan_rows(folders[1], "part") == plan_rows(folders[2], "part")
    assert reads[0] < reads[1]


def test_indexes_are_a_folder(caption_tars, tmp_path, tokenizer):
    for folder in (caption_tars[0], caption_tars[0] / "below"):
        with pytest.raises(ValueError, match=f"--indexes {folder}: {caption_tars[0]} is a file, not a folder"):
            plan_packs(caption_tars, tmp_path / "packs", tokenizer, indexes=str(folder), **OPTIONS)
    assert not (tmp_path / "packs").exists()


def test_indexes_are_of_tars_of_captions(make_tar, tmp_path, tokenizer):
    (tmp_path / "texts.jsonl").write_text('{"text": "a cat"}')
    interleaved = make_tar(tmp_path / "a.tar", [("0.json", json.dumps({"texts": ["a"], "images": [None]}).encode())])
    for file in (tmp_path / "texts.jsonl", interleaved):
        with pytest.raises(ValueError, match="--indexes is for tars of captions"):
            plan_packs([file], tmp_path / "packs", tokenizer, indexes=str(tmp_path / "indexes"), **OPTIONS)


def test_indexes_in_a_bucket_that_is_not_there_are_refused(bucket, resharded, tmp_path, tokenizer):
    """Also where every tar has its own."""
    with pytest.raises(ValueError, match="s3://nobucket/x: there is no such bucket"):
        plan_packs([resharded], tmp_path / "packs", tokenizer, indexes="s3://nobucket/x", **OPTIONS)
    assert not (tmp_path / "packs").exists()


def test_texts_of_an_index_are_those_of_its_very_tar(resharded, tmp_path, tokenizer, caplog):
    """A caption that is changed in its place, and an index of format version 2, which has no texts."""
    data = resharded.read_bytes()
    resharded.write_bytes(data.replace(b"cat 3 ", b"dog 3 "))
    plan_packs([resharded], tmp_path / "packs", tokenizer, **OPTIONS)
    assert "indexes of tars: 1 read without its texts" in caplog.text
    index = index_path(resharded)
    table = pa.parquet.read_table(index)
    made = {"open_qwen2vl": json.dumps({"format_version": 2, "tar_bytes": os.path.getsize(resharded)})}
    pa.parquet.write_table(table.drop_columns("text").replace_schema_metadata(made), index)
    assert read_shard_index(resharded).texts is None
    index.unlink()
    plan_packs([resharded], tmp_path / "right", tokenizer, **OPTIONS)
    assert read_bytes(tmp_path / "packs") == read_bytes(tmp_path / "right")
