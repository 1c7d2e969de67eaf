import gzip
import hashlib
import os
import tarfile

import pytest

from open_qwen2vl.data.storage.tars import find_shards, index_shard, read_member, sample_uid, split_member_name
from open_qwen2vl.processing.sample_error import SampleError


def read_all(path, index=None):
    """Every member's bytes by key and extension, read through the index."""
    index = index or index_shard(path)
    with open(path, "rb") as file:
        return {
            (sample.key, ext): read_member(file.fileno(), f"{sample.key}.{ext}", *place)
            for sample in index.samples
            for ext, place in sample.members.items()
        }


def info(name, kind=tarfile.REGTYPE, link=""):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return name, entry


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_every_tar_format(write_tar, tar_format):
    keys = ["0001", "folder/0002", "./0003", "d/" * 45 + "k" * 60, "with space"]
    if tar_format != tarfile.USTAR_FORMAT:  # which has no room for these
        keys += ["x" * 150, "d" * 300, "d/" * 200 + "k", "emoji/👩‍💻", "ключ" * 40]
    members = [
        (f"{key}.{ext}", f"{key} {ext}".encode() * size)
        for key in keys
        for ext, size in (("jpg", 100), ("txt", 1), ("json", 0))
    ]
    path = write_tar(members, tar_format=tar_format)
    index = index_shard(path)
    assert [sample.key for sample in index.samples] == keys
    assert index.skipped == [] and index.ignored_members == 0
    assert read_all(path, index) == {split_member_name(name): data for name, data in members}


def test_agrees_with_tarfile(caption_tars):
    index = index_shard(caption_tars[0])
    with tarfile.open(caption_tars[0]) as tar:
        expected = {member.name: (member.offset_data, member.size) for member in tar}
    found = {f"{s.key}.{ext}": place for s in index.samples for ext, place in s.members.items()}
    assert found == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("a/b.c/0001.seg.PNG", ("a/b.c/0001", "seg.png")),
        ("0001.JPG", ("0001", "jpg")),
        ("a.b/0001", None),
        (".hidden", None),
        ("d/.hidden.jpg", None),
        ("0001.", None),
        ("", None),
    ],
)
def test_key_is_the_path_up_to_the_first_dot_of_the_name(name, expected):
    assert split_member_name(name) == expected


def test_first_of_a_duplicate_key_wins(write_tar):
    path = write_tar(
        [
            ("a.jpg", b"first"),
            ("a.txt", b"first"),
            ("a.jpg", b"second"),  # adjacent
            ("a.txt", b"second"),
            ("b.jpg", b"b"),
            ("b.JPG", b"same extension once more"),
            ("c.jpg", b"c"),
            ("a.png", b"later, with other members"),
            ("a.json", b"{}"),
        ]
    )
    index = index_shard(path)
    assert [sample.key for sample in index.samples] == ["a", "b", "c"]
    assert index.skipped == [("a", "duplicate_key"), ("b", "duplicate_key"), ("a", "duplicate_key")]
    assert read_all(path, index) == {
        ("a", "jpg"): b"first",
        ("a", "txt"): b"first",
        ("b", "jpg"): b"b",
        ("c", "jpg"): b"c",
    }


def test_only_regular_files_with_safe_names_are_members(write_tar):
    path = write_tar(
        [
            info("folder.d/", tarfile.DIRTYPE),
            ("README", b"no extension"),
            ("folder.d/._0001.jpg", b"hidden"),
            ("/etc/0002.jpg", b"absolute"),
            ("/etc/0002.txt", b"absolute"),
            ("../0003.jpg", b"climbs"),
            ("a/../../0004.jpg", b"climbs"),
            info("0005.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("0005.txt", b"caption"),
            info("0006.jpg", tarfile.LNKTYPE, "0005.txt"),
            info("0007.jpg", tarfile.FIFOTYPE),
            ("a..b/0008.jpg", b"two dots are no way up"),
        ]
    )
    index = index_shard(path)
    assert {sample.key: sorted(sample.members) for sample in index.samples} == {
        "0005": ["txt"],
        "0006": [],
        "0007": [],
        "a..b/0008": ["jpg"],
    }
    assert index.skipped == [(key, "unsafe_name") for key in ("/etc/0002", "../0003", "a/../../0004")]
    assert index.ignored_members == 6


def test_name_that_is_not_utf8_is_unsafe(write_tar):
    path = write_tar([("k\udcff.jpg", b"x"), ("ok.jpg", b"y")])
    index = index_shard(path)
    assert [sample.key for sample in index.samples] == ["ok"]
    assert index.skipped == [("k\\udcff", "unsafe_name")]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_cut_anywhere_keeps_what_is_whole(write_tar, tmp_path, tar_format):
    keys = ["0001", "n" * 130, "0003"]
    members = [(f"{key}.{ext}", key.encode() * 9) for key in keys for ext in ("jpg", "txt")]
    path = write_tar(members, tar_format=tar_format)
    whole, places = path.read_bytes(), index_shard(path)
    ends = {s.key: max(offset + -(-size // 512) * 512 for offset, size in s.members.values()) for s in places.samples}
    cut = tmp_path / "cut.tar"
    for length in range(0, max(ends.values()) + 511, 37):
        cut.write_bytes(whole[:length])
        index = index_shard(cut)
        reasons = [reason for _, reason in index.skipped]
        assert reasons == ["truncated_tar"], length
        kept = [sample.key for sample in index.samples if len(sample.members) == 2]
        assert kept == [key for key in keys if ends[key] <= length], length
        for (key, _), data in read_all(cut, index).items():
            assert data == key.encode() * 9
    assert index_shard(path).skipped == []


def test_cut_sample_is_named(write_tar):
    path = write_tar([("0001.jpg", b"x"), ("0001.txt", b"x"), ("0002.jpg", b"x"), ("0002.txt", b"x" * 600)])
    end_of_header = 7 * 512
    os.truncate(path, end_of_header + 10)
    index = index_shard(path)
    assert [sample.key for sample in index.samples] == ["0001"]
    assert index.skipped == [("0002", "truncated_tar")]


def test_damaged_header_ends_the_tar_and_is_counted(write_tar):
    path = write_tar([(f"{i}.jpg", b"x") for i in range(4)])
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 3] ^= 0xFF
    path.write_bytes(data)
    index = index_shard(path)
    assert [sample.key for sample in index.samples] == ["0", "1"]
    assert index.skipped == [("", "corrupt_tar")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "truncated_tar"), (b"short", "truncated_tar"), (gzip.compress(os.urandom(4096)), "corrupt_tar")],
)
def test_what_is_no_tar_is_counted_once(tmp_path, content, reason):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    index = index_shard(path)
    assert index.samples == [] and index.skipped == [("", reason)]


def test_joined_tars_are_read_to_the_end(write_tar, tmp_path):
    first = write_tar([("a.jpg", b"a")], "first.tar").read_bytes()
    second = write_tar([("b.jpg", b"b"), ("a.jpg", b"again")], "second.tar").read_bytes()
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first + second + b"padding that is no header")
    index = index_shard(joined)
    assert read_all(joined, index) == {("a", "jpg"): b"a", ("b", "jpg"): b"b"}
    assert index.skipped == [("a", "duplicate_key")]


def test_hostile_sizes_do_not_loop(write_tar):
    path = write_tar([("a.jpg", b"a"), ("b.jpg", b"b")])
    data = bytearray(path.read_bytes())
    for size in (b"-0000001000\0", b"\xff" * 12, b"77777777777\0", b"not octal..\0"):
        header = data[1024:1536]
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        data[1024:1536] = header
        path.write_bytes(data)
        index = index_shard(path)
        assert [sample.key for sample in index.samples] == ["a"]
        assert [reason for _, reason in index.skipped] == ["truncated_tar"]


def test_moved_member_is_noticed(write_tar):
    path = write_tar([("a.jpg", b"12345"), ("b.jpg", b"12345"), ("c" * 120 + ".jpg", b"12345")])
    samples = {sample.key: sample.members["jpg"] for sample in index_shard(path).samples}
    with open(path, "rb") as file:
        descriptor = file.fileno()
        assert read_member(descriptor, "a.jpg", *samples["a"]) == b"12345"
        assert read_member(descriptor, "a.JPG", *samples["a"]) == b"12345"
        for name, (offset, size) in {
            "a.jpg": samples["b"],  # another member
            "b.jpg": (samples["b"][0], 4),  # another size
            "b.txt": samples["b"],
            "a.jpg ": (samples["a"][0] + 512, 5),  # no header
            "c" * 120 + ".jpg": (samples["a"][0], 6),
            "e.jpg": (10**9, 5),  # behind the end
        }.items():
            with pytest.raises(SampleError) as error:
                read_member(descriptor, name, offset, size)
            assert error.value.reason == "moved_member"


def test_uid_is_the_jsons_or_a_hash_of_the_name():
    uid = "0123456789abcdefABCDEF0123456789"
    hashed = hashlib.sha256(b"00000.tar/a/0001").hexdigest()[:32]
    assert sample_uid({"uid": uid}, "00000.tar", "a/0001") == uid.lower()
    for metadata in (
        None,
        {},
        [],
        {"uid": None},
        {"uid": 7},
        {"uid": "short"},
        {"uid": uid + "\n"},
        {"uid": "g" * 32},
    ):
        assert sample_uid(metadata, "00000.tar", "a/0001") == hashed


def test_find_shards(write_tar, tmp_path):
    b, a = write_tar([], "b.tar"), write_tar([], "a.tar")
    (tmp_path / "notes.txt").touch()
    assert find_shards([tmp_path]) == [a, b]
    assert find_shards([str(b), str(a)]) == [b, a]
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([], "no shards given"),
        ([tmp_path / "empty"], "empty: no .tar file in this folder"),
        ([tmp_path / "*.tar"], "no such file"),
        ([a, tmp_path], "a.tar: given twice"),
    ):
        with pytest.raises(ValueError, match=message.replace("*", r"\*")):
            find_shards(paths)
