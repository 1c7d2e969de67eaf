import contextlib
import gzip
import hashlib
import os
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from open_qwen2vl.data.storage import tars
from open_qwen2vl.data.storage.tars import (
    find_shards,
    find_tars,
    has_dotted_key,
    index_shard,
    list_files,
    read_json,
    read_member,
    sample_uid,
    split_member_name,
)
from open_qwen2vl.places import LocalFile, open_file
from open_qwen2vl.processing.sample_error import SampleError


def read_all(path, index=None):
    """Every member's bytes by key and extension, read through the index."""
    index = index or index_shard(path)
    with open_file(path) as file:
        return {
            (sample.key, ext): read_member(file, f"{sample.key}.{ext}", *place)
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
    with open_file(path) as file:
        assert read_member(file, "a.jpg", *samples["a"]) == b"12345"
        assert read_member(file, "a.JPG", *samples["a"]) == b"12345"
        for name, (offset, size) in {
            "a.jpg": samples["b"],  # another member
            "b.jpg": (samples["b"][0], 4),  # another size
            "b.txt": samples["b"],
            "a.jpg ": (samples["a"][0] + 512, 5),  # no header
            "c" * 120 + ".jpg": (samples["a"][0], 6),
            "e.jpg": (10**9, 5),  # behind the end
        }.items():
            with pytest.raises(SampleError) as error:
                read_member(file, name, offset, size)
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


def test_find_tars(write_tar, tmp_path):
    tar = write_tar([], "a.tar")
    for name in ("a.tar.gz", "table.parquet"):
        (tmp_path / name).write_bytes(b"1")
        with pytest.raises(ValueError, match=f"{name}: no .tar file"):
            find_tars([tar, tmp_path / name])
    assert find_tars([tmp_path]) == [tar]


def test_members_that_do_not_lie_side_by_side_are_joined(write_tar):
    members = [(f"{key}.{ext}", f"{key} {ext}".encode()) for ext in ("jpg", "txt", "json") for key in "abc"]
    path = write_tar([*members, ("b.txt", b"once more"), ("d.jpg", b"d")])
    index = index_shard(path)
    assert [sample.key for sample in index.samples] == ["a", "b", "c", "d"]
    assert index.skipped == [("b", "duplicate_key")]
    assert read_all(path, index) == {split_member_name(name): data for name, data in [*members, ("d.jpg", b"d")]}
    assert [len(sample.spans) for sample in index.samples] == [3, 3, 3, 1]


def test_a_whole_second_sample_of_a_key_is_a_duplicate_even_with_more_members(write_tar):
    path = write_tar([("a.jpg", b"1"), ("a.txt", b"1"), ("b.jpg", b"b"), ("a.jpg", b"2"), ("a.json", b"2")])
    index = index_shard(path)
    assert [sorted(sample.members) for sample in index.samples] == [["jpg", "txt"], ["jpg"]]
    assert index.skipped == [("a", "duplicate_key")]


def test_a_cut_between_the_members_of_a_sample_counts_once(write_tar, tmp_path):
    path = write_tar([(f"{key}.{ext}", b"x" * 600) for key in "ab" for ext in ("jpg", "txt")])
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[: 3 * 1536])
    index = index_shard(tmp_path / "cut.tar")
    assert [sample.key for sample in index.samples] == ["a"] and index.skipped == [("b", "truncated_tar")]
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[: 4 * 1536])
    index = index_shard(tmp_path / "cut.tar")
    assert [sample.key for sample in index.samples] == ["a", "b"] and index.skipped == [("", "truncated_tar")]


def header(name: str, kind: bytes, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, size
    return entry.tobuf(tarfile.GNU_FORMAT)


LONG_NAME = header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 300) + b"n" * 300 + bytes(212)


@pytest.mark.parametrize(
    "damage",
    [
        *(
            header("x.jpg", kind, size)
            for size in (2**40, 2**63, 2**80)
            for kind in (b"0", b"L", b"K", b"x", b"g", b"S")
        ),
        LONG_NAME * 1500,
        header("././@PaxHeader", b"x", 20) + b"99999999999999999999 size=1\n" + bytes(484),
        header("././@PaxHeader", b"x", 22) + b"22 GNU.sparse.major=1\n".ljust(512, b"\0"),
    ],
)
def test_headers_that_claim_anything_end_the_tar_and_are_counted(write_tar, sample, damage):
    path = write_tar(sample("a") + sample("b"))
    whole = path.read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512)
    path.write_bytes(whole + damage + header("c.jpg", b"0", 0) + bytes(1024))
    index = index_shard(path)
    assert [one.key for one in index.samples][:2] == ["a", "b"] and len(index.samples) <= 3
    assert all(reason in tars.TAR_DAMAGE for _, reason in index.skipped) and len(index.skipped) <= 1
    with pytest.raises(SampleError) if index.skipped else contextlib.nullcontext():
        list(list_files(path))


def test_zeros_and_holes_are_passed_over_in_large_steps(write_tar, sample, monkeypatch):
    path = write_tar(sample("a"))
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size + (8 << 30))
        file.seek(size + (4 << 30))
        file.write(write_tar(sample("b"), name="b.tar").read_bytes())
    reads = []
    read_at = LocalFile.read_at
    monkeypatch.setattr(LocalFile, "read_at", lambda *args: (reads.append(args), read_at(*args))[1])
    index = index_shard(path)
    assert [one.key for one in index.samples] == ["a", "b"] and index.skipped == []
    assert len(reads) < 20


def test_members_larger_than_their_kind_may_be_are_not_read(write_tar, monkeypatch):
    monkeypatch.setattr(tars, "_LIMITS", {"txt": (10, "text_too_large"), "json": (20, "record_too_large")})
    monkeypatch.setattr(tars, "MAX_IMAGE_BYTES", 30)
    path = write_tar([(f"a.{ext}", b"x" * 31) for ext in ("txt", "json", "png")])
    (found,) = index_shard(path).samples
    with open_file(path) as file:
        for ext, reason in (("txt", "text_too_large"), ("json", "record_too_large"), ("png", "image_too_large")):
            with pytest.raises(SampleError) as error:
                read_member(file, f"a.{ext}", *found.members[ext])
            assert error.value.reason == reason
            assert read_member(file, ["b.png", f"a.{ext}"], *found.members[ext], limit=9) == b"x" * 9
        assert read_json(file, found) is None


def test_dots_in_keys_are_told_apart_from_missing_images(write_tar):
    found = index_shard(
        write_tar([("a.b.jpg", b"x"), ("a.b.txt", b"x"), ("c.txt", b"x"), ("d.seg.npy", b"x")])
    ).samples
    assert [has_dotted_key(one) for one in found] == [True, False, False]


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    for paths in ([tmp_path / "a.tar"], [tmp_path]):
        with pytest.raises(ValueError, match="a.tar: no regular file"):
            find_shards(paths)


def test_an_error_of_reading_names_the_file(tmp_path):
    with LocalFile(tmp_path / "a", "wb") as file, pytest.raises(OSError, match=str(tmp_path)):
        file.read_at(1, 0)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1 << 20), st.integers(0, 255)), max_size=6),
    st.integers(0, 1 << 20),
)
def test_any_damage_leaves_members_inside_of_the_file(write_tar, flips, cut):
    path = write_tar([(f"{'k' * 120 if n == 1 else n}.{ext}", b"x" * 700) for n in range(3) for ext in ("jpg", "txt")])
    data = bytearray(path.read_bytes())
    for in_header, place, value in flips:
        place = place % (len(data) // 512) * 512 + place % 160 if in_header else place % len(data)
        data[place] = value
    path.write_bytes(data[: len(data) - cut % len(data)])
    index = index_shard(path)
    assert len({one.key for one in index.samples}) == len(index.samples)
    for one in index.samples:
        assert all(offset + size <= path.stat().st_size for offset, size in one.members.values())
