import copy
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.packing.plan_files import (
    PACKS_PER_BATCH,
    part_name,
    read_part_ends,
    read_part_metadata,
    read_plan,
)
from open_qwen2vl.data.storage.tars import index_shard
from tests.data.killed_step import OUTPUT, check_killed_step
from tests.documents import caption_document, plan_rows

OPTIONS = {"image_seq_length": 4, "max_length": 128, "shards_per_group": 1, "num_workers": 1}


def read_bytes(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def skipped(folder):
    return {(row["key"], row["reason"]) for row in plan_rows(folder, "skipped")}


def plan(shards, folder, tokenizer, **options):
    return plan_packs(shards, folder, tokenizer, **{**OPTIONS, **options})


def test_rows_say_where_each_document_is(caption_tars, tmp_path, tokenizer):
    report = plan(caption_tars, tmp_path / "packs", tokenizer, shards_per_group=2)
    packs = plan_rows(tmp_path / "packs", "part")
    contents = read_plan(tmp_path / "packs")
    own = [read_part_metadata(tmp_path / "packs" / part_name(number))["report"]["packs"] for number in range(2)]
    assert read_part_ends(tmp_path / "packs", contents).tolist() == np.cumsum(own).tolist() and sum(own) == len(packs)
    for pack in packs:
        assert pack["tokens"] == sum(document["tokens"] for document in pack["documents"]) <= 128
        assert pack["images"] == pack["patches"] == len(pack["documents"])
        assert pack["labels"] == pack["tokens"] - 5 * len(pack["documents"])  # <s>, and 4 of the image
        for document in pack["documents"]:
            shard = contents["shards"][document["shard"]]
            tar = tmp_path / "packs" / shard["path"]
            assert (shard["size"], shard["mtime_ns"]) == (tar.stat().st_size, tar.stat().st_mtime_ns)
            (image,), text = document["images"], document["record"]
            assert image["root"] == -1 and document["entries"] == {"first": 0, "count": 2} and text["row"] is None
            data = tar.read_bytes()
            caption = data[text["offset"] : text["offset"] + text["size"]].decode()
            assert document["tokens"] == len(caption_document(caption, tokenizer, 4)[0])
            assert data[image["offset"] :].startswith(b"\x89PNG")
    # Groups are not mixed.
    groups = [{document["shard"] // 2 for document in pack["documents"]} for pack in packs]
    assert all(len(group) == 1 for group in groups)
    counts = [len(pack["documents"]) for pack in packs]
    assert report.documents_per_pack == report.images_per_pack == [min(counts), max(counts)]
    assert (report.samples, report.documents, report.packs) == (120, 120, len(packs))
    assert report.fill == pytest.approx(sum(pack["tokens"] for pack in packs) / (128 * len(packs)))
    assert contents["totals"]["fill"] == report.fill
    assert contents["text_format"] == "caption" and contents["vision"] == {
        "family": "open_qwen2vl",
        "image_seq_length": 4,
    }


def test_every_bad_sample_is_named(write_tar, sample, tmp_path, tokenizer, caplog):
    members = (
        sample("good", "a cat")
        + [("no-image.txt", b"a cat"), ("no-image.json", b"{}")]
        + sample("no-caption")[:1]
        + sample("empty", "")
        + sample("blank", " \n\t\u3000")
        + sample("latin1", "caf\xe9".encode("latin-1"))
        + sample("no-bytes", image=b"")
        + sample("long", "cat " * 500)
        + sample("good", "again")
        + [("/absolute.png", b"x")]
        + sample("bad-json", "a cat")
        + [("bad-json.json", b"[" * 100_000)]
        + sample("last", "cut off")
    )
    path = write_tar(members)
    whole = max(offset for s in index_shard(path).samples for offset, _ in s.members.values())
    os.truncate(path, whole + 3)
    with caplog.at_level(logging.WARNING):
        report = plan([path], tmp_path / "packs", tokenizer)
    expected = {
        ("no-image", "missing_image"),
        ("no-caption", "missing_caption"),
        ("empty", "empty_caption"),
        ("blank", "empty_caption"),
        ("latin1", "bad_caption_encoding"),
        ("no-bytes", "empty_image"),
        ("long", "too_long"),
        ("good", "duplicate_key"),
        ("/absolute", "unsafe_name"),
        ("last", "truncated_tar"),
    }
    assert skipped(tmp_path / "packs") == expected
    assert {row["file"] for row in plan_rows(tmp_path / "packs", "skipped")} == {"../00000.tar"}
    documents = [document["key"] for pack in plan_rows(tmp_path / "packs", "part") for document in pack["documents"]]
    assert sorted(documents) == ["bad-json", "good"]
    assert report.samples == report.documents + sum(report.skipped.values()) == 12
    assert report.skipped["empty_caption"] == 2 and report.skipped["truncated_tar"] == 1
    for key, reason in expected:
        assert f"{key}: {reason}" in caplog.text
    assert "empty_caption 2" in str(report) and "samples    12\n" in str(report)


def test_the_first_of_a_reason_and_each_damaged_tar_are_logged(write_tar, sample, tmp_path, tokenizer, caplog):
    shards = []
    for shard in range(2):
        members = [m for i in range(20) for m in sample(f"{shard}-{i}", "")] + sample(f"ok{shard}")
        shards.append(write_tar(members, f"{shard}.tar"))
    for shard in range(4):
        (tmp_path / f"cut{shard}.tar").write_bytes(b"")
        shards.append(tmp_path / f"cut{shard}.tar")
    plan(shards, tmp_path / "packs", tokenizer, shards_per_group=3)
    assert caplog.text.count("empty_caption") == 3
    assert [f"cut{shard}.tar/: truncated_tar" in caplog.text for shard in range(4)] == [True] * 4
    assert len(plan_rows(tmp_path / "packs", "skipped")) == 44


def test_a_document_of_exactly_the_maximum_is_packed(write_tar, sample, tmp_path, tokenizer):
    caption = "x" * 60
    length = len(caption_document(caption, tokenizer, 4)[0])
    shards = [write_tar(sample("a", caption) + sample("short", "x"))]
    plan(shards, tmp_path / "fits", tokenizer, max_length=length)
    plan(shards, tmp_path / "not", tokenizer, max_length=length - 1)
    assert skipped(tmp_path / "fits") == set()
    assert skipped(tmp_path / "not") == {("a", "too_long")}


def test_special_tokens_in_captions_are_counted_as_text(write_tar, sample, tmp_path, tokenizer):
    caption = "a <|im_end|> b <|image_pad|><s>"
    plan([write_tar(sample("a", caption))], tmp_path / "packs", tokenizer)
    (pack,) = plan_rows(tmp_path / "packs", "part")
    specials = len(tokenizer(caption, add_special_tokens=False)["input_ids"])
    assert pack["tokens"] > 1 + 4 + specials + 1 + 1


def test_uid_of_the_json_or_of_the_name(write_tar, sample, tmp_path, tokenizer):
    uid = "00112233445566778899aabbccddeeff"
    path = write_tar(sample("a", uid=uid.upper()) + sample("b", uid="7") + sample("c"))
    plan([path], tmp_path / "packs", tokenizer)
    rows = plan_rows(tmp_path / "packs", "part")
    uids = {document["key"]: document["uid"] for pack in rows for document in pack["documents"]}
    assert uids["a"] == uid
    assert all(len(value) == 32 and set(value) <= set("0123456789abcdef") for value in uids.values())
    assert len(set(uids.values())) == 3


def test_first_image_extension_of_the_list_is_the_image(write_tar, sample, tmp_path, tokenizer):
    path = write_tar([("a.png", b"1"), ("a.JPEG", b"22"), ("a.mask.jpg", b"333"), ("a.txt", b"x")])
    plan([path], tmp_path / "packs", tokenizer)
    (pack,) = plan_rows(tmp_path / "packs", "part")
    (document,) = pack["documents"]
    assert (document["images"][0]["size"], document["record"]["size"]) == (2, 1)
    assert pack["images"] == 1


def test_workers_make_the_same_plan(caption_tars, tmp_path, tokenizer):
    reports = [plan(caption_tars, tmp_path / f"packs{n}", tokenizer, num_workers=n) for n in (1, 2)]
    assert reports[0] == reports[1]
    assert read_bytes(tmp_path / "packs1") == read_bytes(tmp_path / "packs2")


def test_rerun_does_no_work(caption_tars, tmp_path, tokenizer):
    folder = tmp_path / "packs"
    first = plan(caption_tars, folder, tokenizer)
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert plan(caption_tars, folder, tokenizer) == first
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    made = read_bytes(folder)
    (folder / "part-00001.arrow").unlink()
    (folder / "part-00002.arrow.123.tmp").write_bytes(b"half-written")
    assert plan(caption_tars, folder, tokenizer) == first
    assert read_bytes(folder) == made
    assert (folder / "part-00000.arrow").stat().st_mtime_ns == times["part-00000.arrow"]


def test_parts_of_another_plan_are_refused(caption_tars, tmp_path, tokenizer):
    folder = tmp_path / "packs"
    plan(caption_tars, folder, tokenizer)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["photo"])
    with pytest.raises(ValueError, match="part-00000.arrow: made with max_length 128, now 64"):
        plan(caption_tars, folder, tokenizer, max_length=64)
    with pytest.raises(ValueError, match="image_seq_length 4, now 9"):
        plan(caption_tars, folder, tokenizer, image_seq_length=9)
    with pytest.raises(ValueError, match="made with tokenizer"):
        plan(caption_tars, folder, other)
    with pytest.raises(ValueError, match="other or changed files"):
        plan(caption_tars[::-1], folder, tokenizer)
    with pytest.raises(ValueError, match="part-00002.arrow: part of a plan with more groups"):
        plan(caption_tars[:2], folder, tokenizer)
    os.utime(caption_tars[1])
    with pytest.raises(ValueError, match="part-00001.arrow: made with other or changed files"):
        plan(caption_tars, folder, tokenizer)
    (folder / "part-00000.parquet").touch()
    with pytest.raises(ValueError, match="part-00000.parquet: part of an older plan; delete"):
        plan(caption_tars, folder, tokenizer)
    (folder / "part-00000.parquet").unlink()
    (folder / "part-00001.arrow").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="part-00001.arrow: not a part of a plan"):
        plan(caption_tars, folder, tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_seq_length": 0}, "image_seq_length must be at least 1, got 0"),
        ({"shards_per_group": 0}, "shards_per_group must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 1"),
        ({"num_workers": 0}, "num_workers must be at least 1"),
        ({"max_length": 6}, "max_length 6 is below 7"),
    ],
)
def test_wrong_options_are_one_clear_error(caption_tars, tmp_path, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        plan(caption_tars, tmp_path / "packs", tokenizer, **options)


def test_nothing_to_pack_is_an_error(write_tar, sample, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no shards given"):
        plan([], tmp_path / "packs", tokenizer)
    path = write_tar(sample("a", "") + sample("b", "cat " * 500))
    with pytest.raises(ValueError, match="none of 2 samples can be packed: .*empty_caption.*too_long"):
        plan([path], tmp_path / "packs", tokenizer)
    assert not (tmp_path / "packs/plan.json").exists()


def test_a_shard_without_any_usable_sample_is_an_empty_part(caption_tars, write_tar, tmp_path, tokenizer):
    no_bytes = tmp_path / "no-bytes.tar"
    no_bytes.touch()
    report = plan([no_bytes, write_tar([], "empty.tar"), *caption_tars], tmp_path / "packs", tokenizer)
    assert report.documents == 120 and report.skipped == {"truncated_tar": 1}
    for part in ("part-00000.arrow", "part-00001.arrow"):
        assert read_part_metadata(tmp_path / "packs" / part)["report"]["packs"] == 0


def test_batches_are_small(write_tar, sample, tmp_path, tokenizer):
    path = write_tar([m for i in range(200) for m in sample(f"{i:03d}", "cat")])
    plan([path], tmp_path / "packs", tokenizer, max_length=16)
    part = pa.ipc.open_file(str(tmp_path / "packs/part-00000.arrow"))
    sizes = [part.get_batch(number).num_rows for number in range(part.num_record_batches)]
    assert len(sizes) > 2 and set(sizes[:-1]) == {PACKS_PER_BATCH}


KINDS = {"whole": ("json", "png", "txt"), "no image": ("json", "txt"), "no caption": ("json", "png")}
SAMPLES = st.lists(
    st.tuples(
        st.sampled_from(["0", "1", "2", "3", "a/4", "\u00fc"]),  # few keys, so that some come twice
        st.text(max_size=40),
        st.sampled_from(list(KINDS)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(shards=st.lists(SAMPLES, min_size=1, max_size=3), group=st.integers(1, 3), max_length=st.integers(7, 60))
def test_each_sample_is_planned_once_or_named(shards, group, max_length, make_tar, tokenizer):
    """Nothing lost, nothing doubled, no pack over capacity, and the same input gives the same plan."""
    with tempfile.TemporaryDirectory() as root:
        paths, expected = [], []
        for number, samples in enumerate(shards):
            contents = {"json": b"{}", "png": b"never looked at"}
            members = [
                (f"{key}.{ext}", contents.get(ext, caption.encode()))
                for key, caption, kind in samples
                for ext in KINDS[kind]
            ]
            paths.append(make_tar(Path(root, f"{number}.tar"), members))
            expected += [(f"../{number}.tar", key) for key, _, _ in samples]
        options = {"image_seq_length": 4, "max_length": max_length, "shards_per_group": group, "num_workers": 1}
        folders = [Path(root, "packs"), Path(root, "again")]
        for folder in folders:
            try:
                report = plan_packs(paths, folder, tokenizer, **options)
            except ValueError as error:
                assert "samples can be packed" in str(error) or "not a single record" in str(error)
                report = None
        packs = plan_rows(folders[0], "part")
        lost = [(row["file"], row["key"]) for row in plan_rows(folders[0], "skipped")]
        planned = [
            (f"../{paths[document['shard']].name}", document["key"])
            for pack in packs
            for document in pack["documents"]
        ]
        assert sorted(planned + lost) == sorted(expected)
        assert all(0 < sum(d["tokens"] for d in pack["documents"]) == pack["tokens"] <= max_length for pack in packs)
        assert (report is None) == (not packs)
        assert report is None or (report.samples, report.documents) == (len(expected), len(planned))
        assert read_bytes(folders[0]) == read_bytes(folders[1])


def test_rerun_after_any_file_finishes_the_very_same_plan(caption_tars, tmp_path, tokenizer):
    plan(caption_tars, tmp_path / "whole", tokenizer)
    whole = read_bytes(tmp_path / "whole")
    order = sorted(whole, key=lambda name: (tmp_path / "whole" / name).stat().st_mtime_ns)
    assert order[-4:] == ["shards.arrow", "parts.npy", "figures.npy", "plan.json"] and len(order) == 10
    for count in range(len(order)):
        folder = tmp_path / str(count)
        folder.mkdir()
        for name in order[:count]:
            (folder / name).write_bytes(whole[name])
        (folder / f"{order[count]}.4711.tmp").write_bytes(whole[order[count]][:100])
        plan(caption_tars, folder, tokenizer)
        assert read_bytes(folder) == whole


def test_killed_planner_leaves_only_whole_parts_and_no_process(write_tar, sample, tmp_path, backbones, tokenizer):
    members = [m for i in range(150) for m in sample(f"{i:04d}", f"cat {i} " * (i % 9 + 1))]
    shards = [write_tar(members, f"{shard:02d}.tar") for shard in range(24)]
    whole, folder = tmp_path / "whole", tmp_path / "packs"
    plan(shards, whole, tokenizer, max_length=256)
    command = [sys.executable, "-m", "open_qwen2vl.cli", "pack", *map(str, shards), "--tokenizer", backbones["text"]]
    command += ["--image-seq-length", "4", "--max-length", "256", "--shards-per-group", "1", "--num-workers", "2"]
    with subprocess.Popen([*command, "--output", str(folder)]) as process:
        while process.poll() is None and len(list(folder.glob("part-*.arrow"))) < 3:
            time.sleep(0.001)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (folder / "plan.json").exists()
    assert len(workers) >= 2 and psutil.wait_procs(workers, timeout=20)[1] == []
    finished = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".arrow", ".parquet")}
    assert len([name for name in finished if name.startswith("part-")]) >= 3
    assert finished.items() <= read_bytes(whole).items()
    plan(shards, folder, tokenizer, max_length=256)
    assert read_bytes(folder) == read_bytes(whole)


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments(write_tar, sample, tmp_path, backbones, kills):
    members = [m for i in range(40) for m in sample(f"{i:04d}", f"cat {i} " * (i % 9 + 1))]
    shards = [write_tar(members, f"{shard:02d}.tar") for shard in range(12)]
    command = ["pack", *map(str, shards), "--tokenizer", backbones["text"], "--image-seq-length", "4", "--max-length"]
    command += ["256", "--shards-per-group", "1", "--num-workers", "1", "--output", OUTPUT]
    check_killed_step(command, tmp_path, kills=kills, seed=kills)
