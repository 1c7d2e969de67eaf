"""Clips in prompts are the frames of training: in the chat, in batches, in a video task of lmms-eval."""

import io
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from open_qwen2vl import cli, prepare_for_packing
from open_qwen2vl.evaluation.clips import read_clip
from open_qwen2vl.evaluation.generation import load_model
from open_qwen2vl.evaluation.likelihood import continuation_losses
from open_qwen2vl.evaluation.prompts import PromptBuilder, user_turn
from open_qwen2vl.families import document_processor
from tests.clips import animation, clip, moving_frames
from tests.qwen_vl import FAMILIES

ASKED = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("clips")
    files = {
        "moving.mp4": clip(moving_frames(30), 10),
        "still.mp4": clip(moving_frames(1, 90, 60), 10),
        "moving.gif": animation(moving_frames(8), [250] * 8),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: str(folder / name) for name in files}


@pytest.fixture(
    scope="module",
    params=[FAMILIES[0], *(pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES[1:])],
)
def loaded(request, qwen_vl_folder):
    return load_model(str(qwen_vl_folder(request.param)), "cpu")


def test_a_prompts_clips_are_those_of_training(loaded, clips):
    model, processor = loaded
    builder, documents = PromptBuilder(processor), document_processor(processor)
    moving, still, gif = clips.values()
    prompts = [
        builder.build(user_turn([moving, Image.new("RGB", (60, 40))], "what?")),
        builder.build(user_turn([still, read_clip(processor, gif)], "x")),
        builder.build(user_turn([], "only <|video_pad|> text")),
    ]
    inputs = builder.encode(prompts)
    read = []
    for file in (moving, still, gif):
        data = Path(file).read_bytes()
        media, _ = documents.describe_video(lambda limit, data=data: data[:limit])
        read.append(documents.read_media(data, media))
    pixels = torch.cat([one["pixel_values_videos"] for one in read])
    expected = prepare_for_packing(model, processor)._as_stock_pixels({"pixel_values_videos": pixels})
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    assert torch.equal(inputs["video_grid_thw"], torch.cat([one["video_grid_thw"] for one in read]))
    # Left padding and positions of times: what a batch says is what each prompt alone says.
    together = model.generate(**inputs, **ASKED)[:, inputs["input_ids"].shape[1] :]
    for prompt, answer in zip(prompts, together, strict=True):
        alone = builder.encode([prompt])
        assert model.generate(**alone, **ASKED)[0, alone["input_ids"].shape[1] :].tolist() == answer.tolist()


def test_losses_of_given_answers_about_a_clip(loaded, clips):
    model, processor = loaded
    builder = PromptBuilder(processor)
    inputs = builder.encode([builder.build(user_turn([clips["moving.mp4"]], "which?"))])
    ids = [
        builder.continuation_ids(builder.build(user_turn([], "which?")), answer) for answer in ("yes", "it moves on")
    ]
    for own, (loss, _) in zip(ids, continuation_losses(model, inputs, ids, 2), strict=True):
        whole = torch.cat([inputs["input_ids"], torch.tensor([own])], 1)
        kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, len(own), dtype=torch.long)], 1)
        given = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "mm_token_type_ids": kinds}
        with torch.no_grad():
            logits = model(**{**inputs, **given}).logits[0, -len(own) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(own), reduction="sum").item()
        assert loss == pytest.approx(expected, rel=1e-4)


def test_what_is_no_clip_or_no_family_of_clips_is_an_error(loaded, clips, processor, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no clip")
    with pytest.raises(ValueError, match=r"a\.mp4: cannot identify"):
        read_clip(loaded[1], tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="Open-Qwen2VL takes images"):
        read_clip(processor, clips["moving.mp4"])
    part = {"type": "video", "url": clips["moving.mp4"], "start_time": 1.0}
    with pytest.raises(ValueError, match="start_time"):
        PromptBuilder(loaded[1]).build([{"role": "user", "content": [part]}])
    with pytest.raises(ValueError, match="raw prompt takes no video"):
        PromptBuilder(loaded[1], "raw").build(user_turn([clips["moving.mp4"]], "what?"))


def test_the_chat_shows_videos(qwen_vl_folder, clips, monkeypatch, capsys):
    folder = str(qwen_vl_folder("qwen2_vl"))
    model, processor = load_model(folder, "cpu")
    inputs = PromptBuilder(processor).encode(
        [PromptBuilder(processor).build(user_turn([clips["moving.mp4"]], "what?"))]
    )
    ids = model.generate(**inputs, **ASKED)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(ids, skip_special_tokens=True)
    for options, lines in (
        (["--video", clips["moving.mp4"]], "what?\n"),
        ([], f"/video {clips['moving.mp4']}\nwhat?\n"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        capsys.readouterr()
        assert cli.main(["chat", folder, "--max-new-tokens=4", *options]) == 0
        output = capsys.readouterr()
        assert output.out == f"{expected}\n" and "6 frames of" in output.err
    assert cli.main(["chat", folder, "--video", "nowhere.mp4"]) == 2
    assert "nowhere.mp4" in capsys.readouterr().err


UTILS = "def clips(doc):\n    return [doc['path']]\n"


def test_a_video_task_of_lmms_eval(qwen_vl_folder, clips, tmp_path):
    """Its answers are those to the same clips and questions by hand; a report shows no picture for them."""
    folder = qwen_vl_folder("qwen2_vl")
    rows = [{"path": file, "question": f"what {name}?", "answer": "it moves"} for name, file in clips.items()]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    (tmp_path / "clips_utils.py").write_text(UTILS)
    task = {
        "task": "clips_gen",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.parquet")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "output_type": "generate_until",
        "generation_kwargs": {"max_new_tokens": 4, "until": ["\n\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    text = yaml.safe_dump(task) + "doc_to_visual: !function clips_utils.clips\n"
    (tmp_path / "clips_gen.yaml").write_text(text)
    options = ["--tasks", "clips_gen", "--include-path", str(tmp_path), "--trust-task-code", "--device", "cpu"]
    assert cli.main(["evaluate", str(folder), "--output", str(tmp_path / "results"), *options]) == 0
    samples = pq.read_table(next((tmp_path / "results").rglob("clips_gen*.parquet"))).to_pylist()
    model, processor = load_model(str(folder), "cpu")
    builder = PromptBuilder(processor)
    for row, sample in zip(rows, samples, strict=True):
        inputs = builder.encode([builder.build(user_turn([row["path"]], row["question"]))])
        ids = model.generate(**inputs, **ASKED)[0, inputs["input_ids"].shape[1] :]
        answer = processor.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert answer.split("\n\n")[0].strip() == sample["response"].strip(), row["path"]
        # A gif is an image there.
        is_video = not row["path"].endswith(".gif")
        assert (sample["images"] == []) == is_video == ("<|video_pad|>" in sample["prompt"])


def test_a_clip_knows_what_it_shows(loaded, clips):
    one, again = (read_clip(loaded[1], clips["moving.mp4"]) for _ in range(2))
    assert one.digest == again.digest != read_clip(loaded[1], clips["moving.gif"]).digest
    changed = one._replace(frames=np.ascontiguousarray(one.frames[::-1]))
    assert changed.digest != one.digest
