"""Clips from files to a trained model: every kind of record, named skips, packed equals alone, stop and resume."""

import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl import PackedDataset, PackingCollator, cli, prepare_for_packing
from open_qwen2vl.data.packing.unpacked_dataset import UnpackedConversations
from open_qwen2vl.evaluation.clips import read_clip
from open_qwen2vl.families import document_processor
from open_qwen2vl.trainer import newest_complete_checkpoint, save_final_model
from tests.clips import animation, clip, moving_frames
from tests.data.conftest import write
from tests.families.qwen_vl.packs import SIZES, picture
from tests.families.qwen_vl.test_whole_path import StopAt, losses, make_trainer

CLIPS = {
    "a.mp4": clip(moving_frames(30, seed=1), 10),
    "b.webm": clip(moving_frames(12, 90, 60, seed=2), 5, "webm"),
    "c.mkv": clip(moving_frames(8, 40, 100, seed=3), 4, "mkv"),
    "d.avi": clip(moving_frames(1, seed=4), 10, "avi"),
    "e.mov": clip(moving_frames(25, seed=5), 30000 / 1001, "mov"),
    "f.gif": animation(moving_frames(6, seed=6), [100, 100, 1000, 100, 100, 600]),
}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "it moves"}]}
OPTIONS = ["--max-length", "400", "--max-frames", "8", "--max-video-tokens", "64", "--num-workers", "1"]


def video(name: str) -> dict:
    return {"type": "video", "video": name}


def turn(*parts) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


CONVERSATIONS = [
    {"messages": [turn(video("a.mp4"), "what?"), ANSWER]},
    {"messages": [turn("like ", video("b.webm"), " and ", video("c.mkv"), "?"), ANSWER, turn(video("d.avi")), ANSWER]},
    {"messages": [turn({"type": "image", "image": "0.png"}, video("e.mov"), "same?"), ANSWER], "id": "mixed"},
    {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "x"}]},
    # LLaVA-Video's mark of a video.
    {"video": "a.mp4", "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "x"}]},
    {"videos": ["f.gif"], "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "x"}]},
]
BAD = {
    "too_many_placeholders": {"conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "x"}]},
    "too_few_placeholders": {"image": "0.png", **CONVERSATIONS[3]},
    "ambiguous_videos": {"videos": ["a.mp4"], **CONVERSATIONS[4], "video": "b.webm"},
    "video_is_url": {"messages": [turn(video("https://a.org/a.mp4")), ANSWER]},
    "bad_video": {"messages": [turn(video(["0.png", "1.png"])), ANSWER]},
    "unknown_content": {"messages": [turn({**video("a.mp4"), "video_start": 3}), ANSWER]},
    "missing_image": {"messages": [turn(video("nowhere.mp4")), ANSWER]},
    "corrupt_video": {"messages": [turn(video("broken.mp4")), ANSWER]},
}


def pack(files: list, output: Path, processor: Path, *options: str) -> int:
    return cli.main(
        ["pack", *map(str, files), "--output", str(output), "--processor", str(processor), *OPTIONS, *options]
    )


def skipped(plan: Path) -> list[str]:
    return pq.read_table(plan / "skipped-00000.parquet")["reason"].to_pylist()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder of clips and pictures, `conversations.jsonl`, `captions.jsonl` and `captions.tar`."""
    folder = tmp_path_factory.mktemp("clips")
    broken = CLIPS["a.mp4"][:900]
    for name, content in {**CLIPS, "0.png": picture(*SIZES[0]), "broken.mp4": broken}.items():
        (folder / name).write_bytes(content)
    (folder / "conversations.jsonl").write_text("\n".join(map(json.dumps, [*CONVERSATIONS, *BAD.values()])))
    rows = [
        {"video": "a.mp4", "caption": "one"},
        {"path": "b.webm", "caption": "two"},
        {"image": "0.png", "caption": "3"},
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    members = [
        member
        for name, content in CLIPS.items()
        for member in ((name, content), (f"{name[0]}.txt", f"clip {name[0]}".encode()))
    ]
    members += [("g.mp4", b"no clip"), ("g.txt", b"broken"), ("h.mp4", CLIPS["a.mp4"]), ("h.jpg", b"its thumbnail"),
                ("h.txt", b"clip h"), ("i.png", picture(*SIZES[1])), ("i.txt", b"a picture")]  # fmt: skip
    write(folder / "captions.tar", members)
    return folder


@pytest.fixture(
    scope="module",
    params=["qwen2_vl", *(pytest.param(one, marks=pytest.mark.slow) for one in ("qwen2_5_vl", "qwen3_vl"))],
)
def model(request, qwen_vl_folder) -> Path:
    return qwen_vl_folder(request.param)


@pytest.fixture(scope="module")
def planned(model, files, tmp_path_factory) -> Path:
    """Plans `conversations` and `captions`."""
    folder = tmp_path_factory.mktemp("planned")
    assert pack([files / "conversations.jsonl"], folder / "conversations", model, "--images", str(files)) == 0
    assert pack([files / "captions.tar"], folder / "captions", model) == 0
    return folder


def test_every_record_is_a_document_or_named(planned):
    assert sorted(skipped(planned / "conversations")) == sorted(BAD)
    totals = json.loads((planned / "conversations/plan.json").read_text())["totals"]
    assert (totals["documents"], totals["videos"], totals["images"]) == (len(CONVERSATIONS), 8, 9)
    assert skipped(planned / "captions") == ["corrupt_video"]
    totals = json.loads((planned / "captions/plan.json").read_text())["totals"]
    # A clip's thumbnail is not read; a gif is an image unless it is asked for.
    assert (totals["documents"], totals["videos"], totals["images"]) == (8, 6, 8)


@pytest.mark.parametrize("kind", ["conversations", "captions"])
def test_a_plan_is_read_as_it_was_made(model, planned, kind):
    packs = PackedDataset(planned / kind, AutoProcessor.from_pretrained(model))
    items = [packs[i] for i in range(len(packs))]
    assert not any(item["dropped"] for item in items)
    stats = PackingCollator()(items)["packing_stats"]
    patches = sum(len(item[name]) for item in items for name in ("pixel_values", "pixel_values_videos"))
    assert stats["patches"] == patches == packs.per_pack("patches").sum()
    segments = sum((int(t) * int(h * w) ** 2) for item in items for name in ("image_grid_thw", "video_grid_thw")
                   for t, h, w in item[name])  # fmt: skip
    assert stats["vision_squared"] == segments
    for item in items:
        for pairs, height, width in item["video_grid_thw"].tolist():
            assert pairs <= 4 and pairs * height * width <= 64 * 4


def alone(stock, processor, layout, item: dict, labels: int) -> torch.Tensor:
    """Sum over a pack's documents of the stock model's losses, each by itself and with positions of its own."""
    starts = (item["position_ids"][0] == 0).nonzero().flatten().tolist()
    merge = processor.image_processor.merge_size**2
    left = {name: item[name] for name in layout.empty_media()}
    prepared, total = prepare_for_packing(stock, processor), 0
    for start, stop in zip(starts, [*starts[1:], len(item["input_ids"])], strict=True):
        ids = item["input_ids"][None, start:stop]
        inputs = {"input_ids": ids, "labels": item["labels"][None, start:stop], "use_cache": False}
        kinds = (("pixel_values", "image_grid_thw", processor.image_token_id),
                 ("pixel_values_videos", "video_grid_thw", processor.video_token_id))  # fmt: skip
        inputs["mm_token_type_ids"] = sum((number * (ids == one[2])).int() for number, one in enumerate(kinds, 1))
        for pixels, grids, token in kinds:
            patches = int((ids == token).sum()) * merge
            number = int((left[grids].prod(1).cumsum(0) <= patches).sum()) if patches else 0
            if number:
                inputs |= prepared._as_stock_pixels({pixels: left[pixels][:patches]}) | {grids: left[grids][:number]}
                if grids == "video_grid_thw" and "second_per_grid_ts" in left:
                    inputs["second_per_grid_ts"] = left["second_per_grid_ts"][:number]
                    left["second_per_grid_ts"] = left["second_per_grid_ts"][number:]
            left |= {pixels: left[pixels][patches:], grids: left[grids][number:]}
        # Without boundaries the forward is the stock one.
        total = total + prepared(**inputs, num_items_in_batch=labels).loss
    assert not any(map(len, left.values()))
    return total


@pytest.mark.parametrize("kind", ["conversations", "captions"])
def test_packed_equals_alone(model, planned, kind):
    processor = AutoProcessor.from_pretrained(model)
    packs = PackedDataset(planned / kind, processor)
    items = [packs[index] for index in range(len(packs))]
    batch = PackingCollator()(items)
    batch.pop("packing_stats")
    labels = int((batch["labels"] != -100).sum())
    prepared = prepare_for_packing(AutoModelForImageTextToText.from_pretrained(model), processor)
    stock = AutoModelForImageTextToText.from_pretrained(model)
    with torch.no_grad():
        found = prepared(**batch, num_items_in_batch=labels).loss
        expected = sum(alone(stock, processor, packs.documents, item, labels) for item in items)
    torch.testing.assert_close(found, torch.as_tensor(expected), atol=1e-5, rtol=1e-5)


def test_tables_lists_and_options(model, files, tmp_path, capsys):
    """Captions of json with paths; rows with bytes; animations on request; options belong to the plan."""
    assert pack([files / "captions.jsonl"], tmp_path / "json", model, "--images", str(files)) == 0
    assert json.loads((tmp_path / "json/plan.json").read_text())["totals"]["videos"] == 2
    rows = [{"video": {"bytes": content, "path": name}, "caption": name} for name, content in CLIPS.items()]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert pack([tmp_path / "rows.parquet"], tmp_path / "rows", model) == 0
    packs = PackedDataset(tmp_path / "rows", AutoProcessor.from_pretrained(model))
    assert sum(len(item["video_grid_thw"]) for item in map(packs.__getitem__, range(len(packs)))) == len(CLIPS)
    assert pack([files / "captions.tar"], tmp_path / "moving", model, "--animations") == 0
    plan = json.loads((tmp_path / "moving/plan.json").read_text())
    assert plan["totals"]["videos"] == 8 and plan["vision"]["max_frames"] == 8
    capsys.readouterr()
    assert pack([files / "captions.tar"], tmp_path / "moving", model, "--animations", "--video-fps", "1") == 2
    assert "video_fps 2.0, now 1.0" in capsys.readouterr().err
    assert pack([files / "conversations.jsonl"], tmp_path / "x", model, "--animations", "--images", str(files)) == 2
    assert "animations is for captions" in capsys.readouterr().err
    assert pack([files / "captions.tar"], tmp_path / "x", model, "--max-frames", "7") == 2
    assert "max_frames must be even" in capsys.readouterr().err


def test_rows_without_a_plan(model, files):
    rows = datasets.Dataset.from_list([CONVERSATIONS[3], {**CONVERSATIONS[4], "video": "nowhere.mp4"}])
    items = list(UnpackedConversations(rows, AutoProcessor.from_pretrained(model), image_folder=files))
    assert len(items[0]["video_grid_thw"]) == 1 and not items[0]["dropped"]
    assert items[1]["dropped"] == {"missing_image": 1}


def test_what_has_changed_since_it_was_planned_is_dropped_by_name(model, tmp_path):
    for name in ("a.mp4", "e.mov"):
        (tmp_path / name).write_bytes(CLIPS[name])
    rows = [{"video": name, "caption": name} for name in ("a.mp4", "e.mov")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert pack([tmp_path / "rows.jsonl"], tmp_path / "packs", model, "--images", str(tmp_path)) == 0
    (tmp_path / "a.mp4").write_bytes(clip(moving_frames(20), 10))
    (tmp_path / "e.mov").write_bytes(bytes(len(CLIPS["e.mov"])))
    (item,) = PackedDataset(tmp_path / "packs", AutoProcessor.from_pretrained(model))
    assert item["dropped"] == {"video_changed": 1, "corrupt_video": 1}


def test_a_family_without_videos_leaves_them_out_by_name(files, tmp_path, processor):
    processor.save_pretrained(tmp_path / "model")
    assert pack_ours(files / "captions.tar", tmp_path / "packs", tmp_path / "model") == 0
    assert sorted(skipped(tmp_path / "packs")) == ["video_unsupported"] * 7


def pack_ours(tar: Path, output: Path, model: Path) -> int:
    options = ["--max-length", "400", "--num-workers", "1"]
    return cli.main(["pack", str(tar), "--output", str(output), "--processor", str(model), *options])


def test_a_trained_model_shows_clips_as_its_training_did(model, planned, files, tmp_path):
    """A prompt with other frames would be about another clip than the model has learned to see."""
    packs = PackedDataset(planned / "captions", AutoProcessor.from_pretrained(model))
    trainer = make_trainer(model, packs, tmp_path / "run", max_steps=1, gradient_accumulation_steps=1)
    trainer.train()
    save_final_model(trainer, tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    shown = {"video_fps": 2.0, "max_frames": 8, "max_video_tokens": 64}
    assert processor.video_processor.shown_videos == shown
    clip = read_clip(processor, files / "e.mov")
    assert len(clip.frames) <= 8 and clip.frames[0, 0].size * len(clip.frames) <= 64 * 2 * 32**2
    assert {name: document_processor(processor).fingerprint()[name] for name in shown} == shown
    # A plan's own options count before it.
    assert document_processor(processor, max_frames=4).videos.max_frames == 4
    stock = AutoProcessor.from_pretrained(model)
    assert document_processor(stock).fingerprint()["max_video_tokens"] == 16_384


def test_a_killed_run_resumes_with_the_very_same_losses(model, planned, tmp_path):
    processor = AutoProcessor.from_pretrained(model)
    packs = [item for name in ("captions", "conversations") for item in PackedDataset(planned / name, processor)]
    whole = make_trainer(model, packs, tmp_path / "whole")
    whole.train()
    cut = make_trainer(model, packs, tmp_path / "cut", callbacks=[StopAt()])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = make_trainer(model, packs, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=newest_complete_checkpoint(tmp_path / "cut"))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4
    weights = dict(whole.model.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in resumed.model.named_parameters())
