import json
import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_qwen2vl.cli import main
from open_qwen2vl.data.resharding import pool_index
from open_qwen2vl.data.resharding.options import ReshardOptions
from open_qwen2vl.data.resharding.resharding import reshard
from open_qwen2vl.data.storage.tar_index import read_shard_index
from open_qwen2vl.data.storage.tars import index_shard, sample_uid
from open_qwen2vl.data.storage.uids import UID_DTYPE, format_uid, parse_uid, read_uids, write_uids
from tests.data.killed_step import OUTPUT, assert_same_files, check_killed_step, read_folder


def uid_of(number):
    return format_uid(number * 7919 % 101, number)


def write_subset(path, uids):
    write_uids(path, np.array([parse_uid(uid) for uid in uids], UID_DTYPE))
    return path


def read_tar(path):
    """Name and bytes of each member, as any tar reader sees them."""
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def read_tars(folder):
    return [member for path in sorted(Path(folder).glob("*.tar")) for member in read_tar(path)]


def check_indexes(folder):
    """Each index says what the headers say; returns the uids in their order."""
    uids = []
    for tar in sorted(Path(folder).glob("*.tar")):
        samples, own = read_shard_index(tar)[:2]
        walked = index_shard(tar)
        assert walked.skipped == [] and walked.ignored_members == 0
        assert [(s.key, s.members) for s in samples] == [(s.key, s.members) for s in walked.samples]
        uids += own
    return uids


@pytest.fixture
def pool(make_tar, sample, tmp_path):
    """Five tars of twelve samples; keys are the same in each."""
    folder = tmp_path / "pool"
    folder.mkdir()
    for tar in range(5):
        members = [sample(f"{i:03d}", f"cat {tar} {i}", uid=uid_of(12 * tar + i)) for i in range(12)]
        make_tar(folder / f"{tar}.tar", [member for own in members for member in own])
    return folder


@pytest.fixture
def subset(tmp_path):
    """Every third sample of the pool."""
    return write_subset(tmp_path / "subset.npy", [uid_of(number) for number in range(0, 60, 3)])


def test_chosen_samples_in_the_order_of_the_pool(pool, subset, tmp_path):
    report = reshard(ReshardOptions([pool], subset, tmp_path / "out", samples_per_shard=8, num_workers=1))
    assert check_indexes(tmp_path / "out") == [uid_of(number) for number in range(0, 60, 3)]
    members = {tar: dict(read_tar(pool / f"{tar}.tar")) for tar in range(5)}
    expected = [f"{i:03d}.{ext}" for i in range(0, 12, 3) for ext in ("png", "txt", "json")]
    written = [read_tar(tmp_path / f"out/{n:05d}.tar") for n in range(3)]
    assert [content for tar in written for _, content in tar] == [
        members[tar][name] for tar in range(5) for name in expected
    ]
    # The second tar of the pool has the keys of the first: where both share an output tar they get their uid behind.
    assert [name for name, _ in written[0]][::3] == [f"{i:03d}.png" for i in range(0, 12, 3)] + [
        f"{i:03d}_{uid_of(12 + i)}.png" for i in range(0, 12, 3)
    ]
    assert [name for name, _ in written[2]] == expected
    assert (report.samples, report.written, report.tars, report.uids) == (60, 20, 3, 20)
    assert (report.missing, report.duplicates, report.skipped) == (0, 0, {})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [f"{n:05d}.{end}" for n in range(3) for end in ("tar", "index.parquet")] + ["reshard.json"]
    )


def test_any_number_of_workers_and_any_moment_of_the_end(pool, subset, tmp_path):
    for shuffle in (False, True):
        options = {"samples_per_shard": 6, "shuffle": shuffle, "seed": 3}
        folders = [tmp_path / f"{shuffle}-{workers}" for workers in (1, 2)]
        for workers, folder in enumerate(folders, 1):
            reshard(ReshardOptions([pool], subset, folder, num_workers=workers, **options))
        whole = read_folder(folders[0])
        assert_same_files(read_folder(folders[1]), whole)
        times = {path: path.stat().st_mtime_ns for path in folders[0].iterdir()}
        (folders[0] / "00001.index.parquet").unlink()
        (folders[0] / "00001.tar").write_bytes(b"of a run that was killed before the index")
        (folders[0] / "00002.tar.4711.tmp").write_bytes(b"half")
        reshard(ReshardOptions([pool], subset, folders[0], num_workers=1, **options))
        assert_same_files(read_folder(folders[0]), whole)
        redone = {path.name for path in folders[0].iterdir() if times.get(path) != path.stat().st_mtime_ns}
        assert redone == {"00001.tar", "00001.index.parquet", "reshard.json"}
        assert not (folders[0] / ".work").exists()


def test_a_finished_run_is_only_reported(pool, subset, tmp_path):
    first = reshard(ReshardOptions([pool], subset, tmp_path / "out", samples_per_shard=8, num_workers=1))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    write_uids(subset, read_uids(subset))  # another file of the same content
    assert reshard(ReshardOptions([pool], subset, tmp_path / "out", samples_per_shard=8)) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


def test_shuffle_mixes_a_bounded_number_of_tars(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_index, "SHUFFLE_WINDOW", 2)
    numbers = list(range(60))
    subset = write_subset(tmp_path / "all.npy", [uid_of(number) for number in numbers])
    orders = {}
    for seed in (0, 1):
        reshard(
            ReshardOptions(
                [pool], subset, tmp_path / str(seed), samples_per_shard=12, shuffle=True, seed=seed, num_workers=1
            )
        )
        orders[seed] = [parse_uid(uid)[1] for uid in check_indexes(tmp_path / str(seed))]
        assert sorted(orders[seed]) == numbers
        for tar in range(5):
            own = [number // 12 for number in orders[seed][12 * tar : 12 * tar + 12]]
            assert len(set(own)) <= 2 and own != sorted(own) or len(set(own)) == 1
    assert orders[0] != orders[1] != numbers
    contents = {content for _, content in read_tars(tmp_path / "0")}
    assert contents == {content for path in pool.iterdir() for _, content in read_tar(path)}


def test_duplicates_missing_and_unusable_samples_are_counted(make_tar, sample, encode, tmp_path, capsys, caplog):
    first = (
        sample("a", uid=uid_of(1))
        + sample("twice", uid=uid_of(1))
        + sample("number", uid=uid_of(2))[:2]
        + [("number.json", b'{"uid": 7}')]
        + sample("short", uid="abc")
        + [("../climbs.png", b"x"), ("/absolute.txt", b"x")]
        + sample("b", uid=uid_of(3).upper())
    )
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "a.png"
    second = [("link.png", link)] + sample("c", "again", uid=uid_of(1)) + sample("d", uid=uid_of(4))
    second += sample("cut", uid=uid_of(5))
    tars = [make_tar(tmp_path / f"{n}.tar", members) for n, members in enumerate((first, second))]
    os.truncate(tars[1], max(offset for s in index_shard(tars[1]).samples for offset, _ in s.members.values()) + 1)
    subset = write_subset(tmp_path / "subset.npy", [uid_of(number) for number in range(1, 7)])
    command = ["reshard", *map(str, tars), "--subset", str(subset), "--output", str(tmp_path / "out")]
    assert main([*command, "--num-workers", "1"]) == 0
    assert check_indexes(tmp_path / "out") == [uid_of(number) for number in (1, 3, 4)]
    assert [name for name, _ in read_tar(tmp_path / "out/00000.tar")][::3] == ["a.png", "b.png", "d.png"]
    assert read_uids(tmp_path / "out/missing.npy").tolist() == sorted(parse_uid(uid_of(n)) for n in (2, 5, 6))
    printed = capsys.readouterr().out
    assert "written    3 samples, 1 tars\nmissing    3 of 6 uids (missing.npy)\nduplicates 2\n" in printed
    assert "bad_uid 2, missing_image 1, truncated_tar 1, unsafe_name 2" in printed
    assert "0.tar/short: bad_uid" in caplog.text
    totals = json.loads((tmp_path / "out/reshard.json").read_text())["totals"]
    assert totals["skipped"] == {"bad_uid": 2, "missing_image": 1, "truncated_tar": 1, "unsafe_name": 2}


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_members_of_any_kind_are_kept(make_tar, sample, tmp_path, tar_format):
    long = "/".join(["folder" * 8] * 3)  # longer than a header's 100 bytes, not than ustar's 255
    folder = tarfile.TarInfo("between")
    folder.type = tarfile.DIRTYPE
    members = []
    for number, key in enumerate(("plain", long, "umlaut-\u00fc", "up")):
        json_text = json.dumps({"uid": uid_of(number)}).encode()
        own = [(f"{key}.JPG", b"no image"), (f"{key}.mask.png", b"m" * 512), (f"{key}.txt", b""), ("between", folder)]
        members += [*own, (f"{key}.json", json_text), (f"{key}.bin", b"")]
    tars = [make_tar(tmp_path / f"{name}.tar", members, tar_format) for name in ("a", "b")]
    subset = write_subset(tmp_path / "subset.npy", [uid_of(number) for number in range(4)])
    reshard(ReshardOptions(tars[:1], subset, tmp_path / "out", num_workers=1))
    wanted = [(name, content) for name, content in members if isinstance(content, bytes)]
    assert read_tars(tmp_path / "out") == wanted
    assert check_indexes(tmp_path / "out") == [uid_of(number) for number in range(4)]


def test_taken_keys_get_the_uid_behind(make_tar, sample, tmp_path):
    """Whatever the names are, and even if such a name is there already."""
    long = "x" * 120
    taken = f"a_{uid_of(1)}"
    tars = [
        make_tar(tmp_path / "0.tar", sample("a", "0", uid=uid_of(0)) + sample(taken, "t", uid=uid_of(9))),
        make_tar(tmp_path / "1.tar", sample("a", "1", uid=uid_of(1)) + sample(long, "1", uid=uid_of(2))),
        make_tar(tmp_path / "2.tar", sample(long, "2", uid=uid_of(3)) + sample("a", "2", uid=uid_of(4))),
    ]
    subset = write_subset(tmp_path / "subset.npy", [uid_of(number) for number in (0, 1, 2, 3, 4, 9)])
    reshard(ReshardOptions(tars, subset, tmp_path / "out", num_workers=1))
    keys = [name.removesuffix(".txt") for name, _ in read_tars(tmp_path / "out") if name.endswith(".txt")]
    assert keys == ["a", taken, f"{taken}_{uid_of(1)}", long, f"{long}_{uid_of(3)}", f"a_{uid_of(4)}"]
    assert [c for _, c in read_tars(tmp_path / "out")] == [content for tar in tars for _, content in read_tar(tar)]
    assert check_indexes(tmp_path / "out") == [uid_of(number) for number in (0, 9, 1, 2, 3, 4)]


def test_samples_without_a_uid_are_named_by_tar_and_key(make_tar, sample, tmp_path):
    tars = [
        make_tar(tmp_path / f"{n}/00.tar", sample("a", str(n))) for n in range(2) if not (tmp_path / str(n)).mkdir()
    ]
    named = make_tar(tmp_path / "1/01.tar", sample("a", uid=uid_of(1)))
    uid = sample_uid(None, "00.tar", "a")
    subset = write_subset(tmp_path / "subset.npy", [uid, uid_of(1)])
    reshard(ReshardOptions([tars[0], named], subset, tmp_path / "out", num_workers=1))
    assert check_indexes(tmp_path / "out") == [uid, uid_of(1)]
    with pytest.raises(ValueError, match="0/00.tar and .*1/00.tar have one name, and samples without a uid"):
        reshard(ReshardOptions(tars, subset, tmp_path / "other", num_workers=1))


def test_a_users_mistakes(pool, subset, tmp_path, capsys, monkeypatch):
    def error_of(*arguments):
        assert main(["reshard", *map(str, arguments), "--num-workers", "1"]) == 2
        return capsys.readouterr().err

    out = ("--subset", subset, "--output", tmp_path / "out")
    assert "--samples-per-shard must be at least 1, got 0" in error_of(pool, *out, "--samples-per-shard", 0)
    assert "the pool has tars in this folder" in error_of(pool, "--subset", subset, "--output", pool)
    assert "no such file" in error_of(pool / "9.tar", *out).lower()
    np.save(tmp_path / "floats.npy", np.zeros(3))
    wrong = ("--subset", tmp_path / "floats.npy", "--output", tmp_path / "out2")
    assert "floats.npy: uids are one array of dtype u8,u8" in error_of(pool, *wrong)
    write_subset(tmp_path / "others.npy", ["f" * 32])
    none = ("--subset", tmp_path / "others.npy", "--output", tmp_path / "out3")
    assert "others.npy: none of its 1 uids is in the pool" in error_of(pool, *none)
    reshard(ReshardOptions([pool], subset, tmp_path / "out", num_workers=1))
    assert "made with samples_per_shard 10000, now 5" in error_of(pool, *out, "--samples-per-shard", 5)
    assert "made with shuffle_seed None, now 0" in error_of(pool, *out, "--shuffle")
    assert "made with other or changed tars" in error_of(pool / "0.tar", *out)
    write_subset(subset, [uid_of(1)])
    assert "made with another subset" in error_of(pool, *out)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/a.tar").touch()
    assert "a.tar: a tar that reshard has not made" in error_of(
        pool, "--subset", subset, "--output", tmp_path / "strange"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without accelerate launch" in error_of(pool, "--subset", subset, "--output", tmp_path / "out4")


def test_a_tar_that_changes_under_way_is_an_error(pool, subset, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "open_qwen2vl.data.resharding.resharding.Layout", lambda *args: os.utime(pool / "1.tar") or layout(*args)
    )
    layout = pool_index.Layout
    with pytest.raises(ValueError, match="1.tar: has changed since the run began"):
        reshard(ReshardOptions([pool], subset, tmp_path / "out", num_workers=1))
    assert not (tmp_path / "out/00000.tar").exists()


MEMBERS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "sub/c"]), st.sampled_from(["jpg", "txt", "json", "dir"]), st.binary(max_size=9)
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(tars=st.lists(MEMBERS, min_size=1, max_size=3), count=st.integers(1, 4), seed=st.none() | st.integers(0, 3))
def test_every_sample_of_any_pool_is_copied_whole(tars, count, seed, make_tar):
    """With all uids of a pool as the subset, what comes out is what an index of the pool finds."""
    with tempfile.TemporaryDirectory() as root:
        paths, expected = [], {}
        for number, members in enumerate(tars):
            written = []
            for key, extension, content in members:
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.type = tarfile.DIRTYPE
                written.append((f"{key}.{extension}", info if extension == "dir" else b"{" + content))
            paths.append(make_tar(Path(root, f"{number}.tar"), written))
            data = paths[-1].read_bytes()
            for sample in index_shard(paths[-1]).samples:
                uid = sample_uid(None, paths[-1].name, sample.key)
                if sample.members:
                    expected[uid] = {ext: data[start : start + n] for ext, (start, n) in sample.members.items()}
        subset = write_subset(Path(root, "subset.npy"), list(expected)) if expected else None
        if subset is None:
            return
        output = Path(root, "out")
        reshard(
            ReshardOptions(
                paths, subset, output, samples_per_shard=count, shuffle=seed is not None, seed=seed or 0, num_workers=1
            )
        )
        found = {}
        for tar in sorted(output.glob("*.tar")):
            data = tar.read_bytes()
            samples, uids = read_shard_index(tar)[:2]
            assert len(samples) == count or tar == max(output.glob("*.tar"))
            for sample, uid in zip(samples, uids, strict=True):
                found[uid] = {ext: data[start : start + n] for ext, (start, n) in sample.members.items()}
        assert found == expected
        assert sorted(check_indexes(output)) == sorted(expected)


def kill_command(make_tar, sample, tmp_path):
    """A pool that takes some tenths of a second."""
    pool = tmp_path / "pool"
    pool.mkdir()
    for tar in range(12):
        members = [sample(f"{i:03d}", f"cat {i}", bytes(3000), uid_of(40 * tar + i)) for i in range(40)]
        make_tar(pool / f"{tar:02d}.tar", [member for own in members for member in own])
    subset = write_subset(tmp_path / "subset.npy", [uid_of(number) for number in range(0, 482, 2)])
    command = ["reshard", str(pool), "--subset", str(subset), "--samples-per-shard", "20", "--shuffle"]
    return [*command, "--num-workers", "1", "--output", OUTPUT]


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments(make_tar, sample, tmp_path, kills):
    check_killed_step(kill_command(make_tar, sample, tmp_path), tmp_path, kills=kills, seed=kills)


def save_captions(pool, folder, leave_out=()):
    """Files as recaption writes them, with a caption for each sample but some."""
    from open_qwen2vl.data.scoring.score_files import DETAIL, score_table, write_scores

    for tar in sorted(pool.glob("*.tar")):
        keys = [sample.key for sample in index_shard(tar).samples]
        uids = [uid_of(12 * int(tar.stem) + int(key)) for key in keys]
        values = np.array([[np.nan if uid in leave_out else 3.0] for uid in uids])
        table = score_table(["recaption"], "m", keys, uids, values, [None] * len(keys), "refusal")
        texts = [f"new {uid} \u2713" + " and more" * (60 * int(key)) for uid, key in zip(uids, keys, strict=True)]
        table = table.append_column(DETAIL, pa.array(texts))
        write_scores(folder / f"{tar.stem}.parquet", table, {"recipe": {"scorer": "recaption"}})
    return folder


def test_new_captions_take_the_place_of_a_share(pool, tmp_path, capsys):
    everything = [uid_of(i) for i in range(60)]
    without = everything[5:8]
    captions = save_captions(pool, tmp_path / "captions", without)
    subset = write_subset(tmp_path / "s.npy", everything)
    reports, taken = [], {}
    for name, share, seed in (("all", 1, 0), ("half", 0.5, 0), ("other", 0.5, 1)):
        options = {"caption_share": share, "seed": seed, "samples_per_shard": 25}
        reports.append(reshard(ReshardOptions((pool,), subset, tmp_path / name, captions=(captions,), **options)))
        assert check_indexes(tmp_path / name) == everything_in_order(tmp_path / name)
        texts = [data.decode() for key, data in read_tars(tmp_path / name) if key.endswith(".txt")]
        taken[name] = {text.split()[1] for text in texts if text.startswith("new ")}
        pictures = [data for key, data in read_tars(tmp_path / name) if key.endswith(".png")]
        assert pictures == [data for key, data in read_tars(pool) if key.endswith(".png")]
    assert (reports[0].new_captions, reports[0].without_caption, reports[0].written) == (57, 3, 60)
    assert taken["all"] == set(everything) - set(without)
    assert 15 < len(taken["half"]) < 45 and taken["half"] != taken["other"]
    assert "57 new, 3 of the pool (3 for want of a new one)" in str(reports[0])
    command = ["reshard", str(pool), "--subset", str(subset), "--num-workers", "1", "--output", str(tmp_path / "all")]
    assert main([*command, "--samples-per-shard", "25"]) == 2
    assert "made with other captions" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "x"), "--captions", str(tmp_path / "captions/0.parquet")]) == 0
    assert "9 new, 51 of the pool (51 for want of a new one)" in capsys.readouterr().out
    assert main([*command[:-1], str(tmp_path / "y"), "--captions", str(subset)]) == 2
    assert main([*command[:-1], str(tmp_path / "y"), "--caption-share", "0.5"]) == 2
    assert "--caption-share is for --captions" in capsys.readouterr().err


def everything_in_order(folder):
    """The uids that the json members name, in the tars' order."""
    return [json.loads(data)["uid"] for name, data in read_tars(folder) if name.endswith(".json")]
