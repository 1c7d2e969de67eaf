"""Frames that were extracted once stand for their clips: the same plan and ids, and the pixels of direct decoding."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from open_qwen2vl import PackedDataset, cli
from tests.clips import animation, clip, moving_frames
from tests.data.conftest import write
from tests.families.qwen_vl.packs import noisy_clip, picture

CLIPS = {"a.mp4": noisy_clip(96, 64, 30), "b.webm": clip(moving_frames(12, 90, 60, seed=2), 5, "webm")}
LIMITS = ["--max-frames", "8", "--max-video-tokens", "64"]


@pytest.fixture(scope="module")
def model(qwen_vl_folder) -> Path:
    return qwen_vl_folder("qwen2_vl")


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    """`0.tar` of captions, one clip broken and one a gif; `1.tar` of pictures; a folder `clips` of the same clips."""
    folder = tmp_path_factory.mktemp("pool")
    members = [("a.json", b'{"uid": "000102030405060708090a0b0c0d0e0f"}')]
    for name, content in CLIPS.items():
        members += [(name, content), (f"{name[0]}.txt", f"clip {name}".encode())]
    members += [("c.mp4", b"none"), ("c.txt", b"broken"), ("d.txt", b"a gif"),
                ("d.gif", animation(moving_frames(6), [200] * 6))]  # fmt: skip
    write(folder / "0.tar", members)
    write(folder / "1.tar", [("p.png", picture(90, 60)), ("p.txt", b"a picture")])
    (folder / "clips/deep").mkdir(parents=True)
    (folder / "clips/a.mp4").write_bytes(CLIPS["a.mp4"])
    (folder / "clips/deep/b.webm").write_bytes(CLIPS["b.webm"])
    (folder / "clips/notes.txt").write_text("no clip")
    return folder


def extract(source: Path, output: Path, model: Path, *options: str) -> int:
    names = [str(source), "--output", str(output), "--processor", str(model), "--num-workers", "1"]
    return cli.main(["extract-frames", *names, *LIMITS, *options])


def pack(sources: list[Path], output: Path, model: Path, *options: str) -> int:
    names = [*map(str, sources), "--output", str(output), "--processor", str(model), "--num-workers", "1"]
    return cli.main(["pack", *names, "--max-length", "300", *LIMITS, *options])


def items(packs: Path, model: Path) -> list[dict]:
    dataset = PackedDataset(packs, AutoProcessor.from_pretrained(model))
    return [dataset[index] for index in range(len(dataset))]


def totals(packs: Path) -> dict:
    return json.loads((packs / "plan.json").read_text())["totals"]


def check_same(direct: Path, extracted: Path, model: Path, lossless: bool) -> None:
    pairs = list(zip(items(direct, model), items(extracted, model), strict=True))
    assert sum(len(one["video_grid_thw"]) for one, _ in pairs) == 2
    for one, other in pairs:
        for name in ("input_ids", "labels", "position_ids", "video_grid_thw"):
            assert torch.equal(one[name], other[name])
        difference = (one["pixel_values_videos"].int() - other["pixel_values_videos"].int()).abs()
        # JPEG of quality 95 on blocks of random colours, which are hard for it.
        assert difference.max() == 0 if lossless else difference.float().mean() < 2 and difference.max() > 0


@pytest.mark.parametrize("lossless", [True, False])
def test_tars_of_frames_are_planned_and_read_as_those_of_the_clips(model, pool, tmp_path, capsys, lossless):
    options = ["--lossless"] if lossless else []
    assert extract(pool, tmp_path / "frames", model, *options) == 0
    assert "corrupt_video 1" in capsys.readouterr().out
    with tarfile.open(tmp_path / "frames/0.tar") as tar:
        assert tar.getnames() == ["a.json", "a.frames", "a.txt", "b.frames", "b.txt", "d.txt", "d.gif"]
    shards = {"direct": pool, "extracted": tmp_path / "frames"}
    for name, folder in shards.items():
        assert pack([folder / "0.tar", folder / "1.tar"], tmp_path / name, model) == 0
    assert totals(tmp_path / "direct")["skipped"] == {"corrupt_video": 1}
    assert totals(tmp_path / "extracted")["skipped"] == {}
    check_same(tmp_path / "direct", tmp_path / "extracted", model, lossless)


def test_a_folder_of_frames_stands_for_that_of_the_clips(model, pool, tmp_path):
    assert extract(pool / "clips", tmp_path / "frames", model, "--lossless") == 0
    found = sorted(str(path.relative_to(tmp_path / "frames")) for path in (tmp_path / "frames").rglob("*.frames"))
    assert found == ["a.frames", "deep/b.frames"]
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "it moves"}]
    rows = [{"videos": [name], "messages": turns} for name in ("a.mp4", "deep/b.webm")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, folder in (("direct", pool / "clips"), ("extracted", tmp_path / "frames")):
        assert pack([tmp_path / "rows.jsonl"], tmp_path / name, model, "--images", str(folder)) == 0
    check_same(tmp_path / "direct", tmp_path / "extracted", model, lossless=True)


def test_gifs_are_clips_on_request(model, pool, tmp_path):
    assert extract(pool / "0.tar", tmp_path / "frames", model, "--animations") == 0
    assert pack([tmp_path / "frames/0.tar"], tmp_path / "packs", model) == 0
    assert totals(tmp_path / "packs")["videos"] == 3


def test_of_several_clips_of_a_sample_the_one_that_counts_becomes_frames(model, tmp_path, caplog):
    members = [
        ("a.webm", CLIPS["b.webm"]),
        ("a.mp4", CLIPS["a.mp4"]),
        ("a.png", picture(90, 60)),
        ("a.txt", b"a clip"),
    ]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/0.tar", [*members, ("b.gif", animation(moving_frames(6), [200] * 6)), ("b.txt", b"a gif")])
    assert extract(tmp_path / "in", tmp_path / "out", model, "--animations", "--lossless") == 0
    with tarfile.open(tmp_path / "out/0.tar") as tar:
        assert tar.getnames() == ["a.frames", "a.png", "a.txt", "b.frames", "b.txt"]
    assert "a.webm is left out, for a.mp4 counts" in caplog.text
    for name in ("in", "out"):
        assert pack([tmp_path / name], tmp_path / f"packs-{name}", model, "--animations") == 0
    check_same(tmp_path / "packs-in", tmp_path / "packs-out", model, lossless=True)


def test_frames_of_a_clip_that_has_changed_are_refused(model, pool, tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").write_bytes(CLIPS["a.mp4"])
    (tmp_path / "clips/c.mp4").write_bytes(b"none")
    for _ in range(2):
        assert extract(tmp_path / "clips", tmp_path / "frames", model) == 0
    (tmp_path / "clips/c.mp4").write_bytes(CLIPS["a.mp4"])  # repaired, and another one is new
    (tmp_path / "clips/d.webm").write_bytes(CLIPS["b.webm"])
    assert extract(tmp_path / "clips", tmp_path / "frames", model) == 0
    assert {path.name for path in (tmp_path / "frames").glob("*.frames")} == {"a.frames", "c.frames", "d.frames"}
    (tmp_path / "clips/a.mp4").write_bytes(clip(moving_frames(8)))
    assert extract(tmp_path / "clips", tmp_path / "frames", model) == 2
    assert "a.mp4 has changed since its frames were extracted" in capsys.readouterr().err


def test_a_rerun_makes_what_is_missing_and_other_options_are_refused(model, pool, tmp_path, capsys):
    assert extract(pool, tmp_path / "frames", model) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "frames").glob("*.tar")}
    (tmp_path / "frames/0.tar").unlink()
    (tmp_path / "frames/0.tar.123.tmp").write_bytes(b"of a killed run")
    capsys.readouterr()
    assert extract(pool, tmp_path / "frames", model) == 0
    assert "1 done before" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "frames").glob("*.tar")} == before
    assert extract(pool, tmp_path / "frames", model, "--lossless") == 2
    assert "lossless" in capsys.readouterr().err
    assert extract(pool, tmp_path / "frames", model, "--video-fps", "1") == 2
    assert "vision" in capsys.readouterr().err
    # A plan with other options than the frames have.
    assert pack([tmp_path / "frames/0.tar"], tmp_path / "packs", model, "--video-fps", "1") == 0
    assert totals(tmp_path / "packs")["skipped"]["other_frames"] >= 1


def test_what_cannot_be_extracted_is_an_error(model, pool, tmp_path, capsys, processor):
    assert extract(pool, pool, model) == 2
    assert "choose another output" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert extract(tmp_path / "empty", tmp_path / "x", model) == 2
    assert "no clip" in capsys.readouterr().err
    processor.save_pretrained(tmp_path / "ours")
    names = [str(pool / "0.tar"), "--output", str(tmp_path / "y"), "--processor", str(tmp_path / "ours")]
    assert cli.main(["extract-frames", *names]) == 2
    assert "takes no videos" in capsys.readouterr().err
