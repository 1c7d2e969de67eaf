"""The walk over tars, whatever scores: bad input, reruns, kills, ranks."""

import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from open_qwen2vl.cli import main
from open_qwen2vl.data.engine.engine import ShardTask
from open_qwen2vl.data.scoring import SCORERS, ScoreOptions, read_score_metadata, score_pool
from open_qwen2vl.data.scoring.scoring import Scorer, TarScorer
from open_qwen2vl.data.storage.tars import index_shard
from open_qwen2vl.options import kinds
from tests.data.killed_step import OUTPUT, check_killed_step, read_folder
from tests.data.scoring.conftest import rows


@pytest.fixture
def bad_tar(write_tar, sample, photo, encode):
    """One sample of each kind of damage, and two good ones."""
    link = tarfile.TarInfo("h.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        *sample("a", "a good one", photo(0), "A" * 32),
        ("b.txt", b"no picture"),
        ("c.jpg", photo(1)),
        *sample("d", b"\xff\xfe", photo(2)),
        *sample("e", "  \n", photo(3)),
        *sample("f", "cut short", photo(4)[:300]),
        *sample("g", "no picture at all", b"GIF89a or so"),
        ("h.jpg", link),
        ("h.txt", b"a link"),
        *sample("i", "a bomb", encode(Image.new("1", (10_000, 10_000)))),
        *sample("j", "a short uid", photo(5), "abc"),
        *sample("a", "the same key", photo(6)),
        *sample("../k", "climbs up", photo(7)),
        *sample("/l", "absolute", photo(8)),
        *sample("m", "another good one", photo(9)),
        *sample("n", "no bytes", b""),
        *sample("o", "the last one", photo(10)),
    ]
    path = write_tar(members)
    offset, _ = index_shard(path).samples[-1].members["txt"]
    with open(path, "rb+") as file:
        file.truncate(offset + 3)
    return path


REASONS = {
    "b": "missing_image",
    "c": "missing_caption",
    "d": "bad_caption_encoding",
    "e": "empty_caption",
    "f": "corrupt_image",
    "g": "corrupt_image",
    "h": "missing_image",
    "i": "image_too_large",
    "j": "bad_uid",
    "n": "empty_image",
}


@pytest.mark.parametrize("scorer", ["clip", "basic", "image-hash"])
def test_bad_input_is_counted_by_reason(bad_tar, clip_folder, tmp_path, scorer, caplog):
    options = {"model": f"local-dir:{clip_folder}"} if scorer == "clip" else {}
    report = score_pool(ScoreOptions([bad_tar], tmp_path / "scores", scorer, num_workers=1, **options))
    path = tmp_path / "scores" / scorer / "00000.parquet"
    found = rows(path)
    expected = dict(REASONS)
    if scorer == "basic":
        del expected["f"]  # its header is whole, and no more is read
    assert {row["key"]: row["reason"] for row in found if row["reason"]} == expected
    assert {row["key"] for row in found} == {"a", "m"} | set(REASONS)
    assert all((row["reason"] is None) == (row["value"] is not None) for row in found) or scorer == "image-hash"
    assert report.skipped["duplicate_key"] == 1 and report.skipped["unsafe_name"] == 2
    assert report.skipped["truncated_tar"] == 1
    assert report.skipped.total() == report.samples - (3 if scorer == "basic" else 2)
    assert read_score_metadata(path)["skipped"] == dict(report.skipped)
    uids = {row["key"]: row["uid"] for row in found}
    assert uids["a"] == "a" * 32 and all(len(uid) == 32 for uid in uids.values())
    assert "corrupt_image" in caplog.text


class Halves(Scorer):
    """Scores the number in a caption, in batches that must be full but for the last."""

    parts, model, recipe, batch_size, missing_reason = ("half", "sign"), "none", {"a": 1}, 3, "odd"

    def __init__(self):
        self.batches = []

    def prepare(self, pair):
        return int(pair.caption)

    def score(self, batch):
        self.batches.append(len(batch))
        return np.array([[n / 2 if n % 2 == 0 else np.nan, np.sign(n)] for n in batch])


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_go_across_samples_that_cannot_be_used(write_tar, sample, tmp_path, threads):
    members = []
    for i in range(8):
        members += sample(f"{i}", str(i)) if i != 4 else [("4.txt", b"4")]
    halves = Halves()
    outcome = TarScorer(lambda: halves, "n", {"x": 1}, threads)(
        ShardTask(write_tar(members), tmp_path / "s/n.parquet")
    )
    assert halves.batches == [3, 3, 1]
    assert (outcome.samples, outcome.skipped) == (8, {"missing_image": 1, "odd": 4})
    found = {(row["key"], row["scorer"]): (row["value"], row["reason"]) for row in rows(tmp_path / "s/n.parquet")}
    assert found["6", "n.half"] == (3, None) and found["7", "n.half"] == (None, "odd")
    assert found["7", "n.sign"] == (1, None) and found["4", "n.sign"] == (None, "missing_image")
    metadata = read_score_metadata(tmp_path / "s/n.parquet")
    assert metadata["made_with"] == {"a": 1} and metadata["recipe"]["x"] == 1


def test_a_rerun_makes_what_is_missing(pool, tmp_path, clip_folder):
    options = {"model": f"local-dir:{clip_folder}", "batch_size": 4, "num_workers": 1}
    score_pool(ScoreOptions([pool], tmp_path, "clip", **options))
    whole = read_folder(tmp_path / "clip")
    (tmp_path / "clip/00001.parquet").unlink()
    (tmp_path / "clip/00001.parquet.123.tmp").write_bytes(b"half")
    before = (tmp_path / "clip/00000.parquet").stat().st_mtime_ns
    report = score_pool(ScoreOptions([pool], tmp_path, "clip", **options))
    assert (report.shards, report.done_before) == (1, 2)
    assert read_folder(tmp_path / "clip") == whole
    assert (tmp_path / "clip/00000.parquet").stat().st_mtime_ns == before


def test_a_rerun_with_something_else(pool, tmp_path, clip_folder):
    model = tmp_path / "model"
    shutil.copytree(clip_folder, model)
    options = {"model": f"local-dir:{model}", "num_workers": 1}
    score_pool(ScoreOptions([pool], tmp_path, "clip", **options))
    with pytest.raises(ValueError, match=r"00000.parquet: made with --model .*model.*now ViT-B-32.*another --output"):
        score_pool(ScoreOptions([pool], tmp_path, "clip", model="ViT-B-32", pretrained="openai"))
    with pytest.raises(ValueError, match="made with --scorer clip, now basic"):
        score_pool(ScoreOptions([pool], tmp_path, "basic", name="clip"))
    os.utime(pool / "00002.tar", (1, 1))
    with pytest.raises(ValueError, match="00002.parquet: made with another or a changed .*00002.tar"):
        score_pool(ScoreOptions([pool], tmp_path, "clip", **options))
    os.utime(model / "open_clip_model.safetensors", (2**31, 2**31))
    with pytest.raises(ValueError, match="made with --model"):
        score_pool(ScoreOptions([pool], tmp_path, "clip", **options))


def test_two_tars_of_one_name(pool, tmp_path):
    (tmp_path / "more").mkdir()
    shutil.copy(pool / "00000.tar", tmp_path / "more")
    with pytest.raises(ValueError, match=r"pool/00000.tar and .*more/00000.tar have one name"):
        score_pool(ScoreOptions([pool, tmp_path / "more"], tmp_path, "basic"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scorer", "clip"], "--scorer clip needs --model"),
        (["--scorer", "metadata"], "--scorer metadata needs --columns"),
        (["--scorer", "basic", "--model", "m", "--batch-size", "2"], "--scorer basic takes no --model, --batch-size"),
        (["--scorer", "clip", "--model", "m", "--metric", "all"], "--scorer clip takes no --metric"),
        (["--scorer", "basic", "--name", "a b"], "--name a b: a name has letters"),
        (["--scorer", "basic", "--name", "../up"], "--name ../up"),
        (["--scorer", "basic", "--num-workers", "0"], "--num-workers must be at least 1"),
        (["--scorer", "clip", "--model", "m", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--scorer", "basic", "--gpus-per-worker", "1"], "--gpus-per-worker is for --engine ray"),
        (["--scorer", "basic", "--engine", "ray", "--gpus-per-worker", "1"], "--gpus-per-worker is for"),
        (["nowhere.tar", "--scorer", "basic"], "nowhere.tar: no such file"),
    ],
)
def test_mistakes_end_in_one_line(pool, tmp_path, capsys, arguments, message):
    assert main(["score", str(pool), *arguments, "--output", str(tmp_path / "scores")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "scores").exists()


def test_the_command_scores(pool, tmp_path, capsys, clip_folder):
    arguments = ["score", str(pool), "--output", str(tmp_path), "--num-workers", "1"]
    assert main([*arguments, "--scorer", "clip", "--model", f"local-dir:{clip_folder}", "--name", "dfn"]) == 0
    assert main([*arguments, "--scorer", "basic"]) == 0
    assert capsys.readouterr().out.count("samples    21") == 2
    assert sorted(path.parent.name for path in tmp_path.rglob("00002.parquet")) == ["basic", "dfn"]
    assert tuple(SCORERS) == kinds(ScoreOptions)["scorer"].choices


def test_ranks_share_the_tars(pool, tmp_path, monkeypatch):
    reports = []
    for rank in range(2):
        for variable, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(variable, str(value))
        reports.append(score_pool(ScoreOptions([pool], tmp_path, "image-hash", num_workers=1)))
    assert [report.shards for report in reports] == [2, 1]
    assert len(list((tmp_path / "image-hash").iterdir())) == 3


@pytest.mark.slow  # three times the imports
def test_two_launched_processes(pool, tmp_path, clip_folder):
    """By torchrun, which is what `accelerate launch` uses for several GPUs."""
    arguments = ["score", str(pool), "--scorer", "clip", "--model", f"local-dir:{clip_folder}", "--batch-size", "4"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    run = subprocess.run(
        [*launch, "open_qwen2vl.cli", *arguments, "--output", str(tmp_path / "two")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert sorted(line.split()[1] for line in run.stdout.splitlines() if line.startswith("shards")) == ["1", "2"]
    assert main([*arguments, "--output", str(tmp_path / "one")]) == 0
    assert read_folder(tmp_path / "two") == read_folder(tmp_path / "one")


@pytest.mark.slow  # starts Ray
def test_ray_actors_score(pool, tmp_path, clip_folder):
    arguments = ["score", str(pool), "--scorer", "clip", "--model", f"local-dir:{clip_folder}", "--batch-size", "4"]
    arguments += ["--device", "cpu", "--output"]
    assert main([*arguments, str(tmp_path / "ray"), "--engine", "ray"]) == 0
    assert main([*arguments, str(tmp_path / "local")]) == 0
    assert read_folder(tmp_path / "ray") == read_folder(tmp_path / "local")


@pytest.fixture
def many_tars(tmp_path, make_tar, sample, photo):
    """A folder of six tars, and beside it one for outputs."""
    (tmp_path / "outputs").mkdir()
    pool = tmp_path / "pool"
    pool.mkdir()
    for shard in range(6):
        members = [member for i in range(12) for member in sample(f"{i}", f"{shard} {i}", photo(12 * shard + i))]
        make_tar(pool / f"{shard}.tar", members)
    return pool


@pytest.mark.parametrize(
    ("scorer", "workers", "kills"),
    [
        ("basic", "1", 3),
        ("concepts", "1", 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("clip", "1", 30), ("image-hash", "1", 30), ("concepts", "1", 20), ("basic", "2", 10))
        ),
    ],
)
def test_a_killed_run_leaves_nothing_half_written(many_tars, tmp_path, clip_folder, scorer, workers, kills):
    model = (
        ["--model", f"local-dir:{clip_folder}", "--batch-size", "5", "--keep-embeddings"] if scorer == "clip" else []
    )
    command = ["score", str(many_tars), "--scorer", scorer, *model, "--num-workers", workers, "--output", OUTPUT]
    preload = ["open_qwen2vl.data.scoring.basic", "open_qwen2vl.data.scoring.concepts"]
    preload += ["open_clip"] * (scorer == "clip")
    check_killed_step(command, tmp_path / "outputs", kills=kills, preload=preload)
