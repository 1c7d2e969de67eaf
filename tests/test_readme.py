"""The README's commands, run as they stand there on tiny backbones (its quickstart: recipes/test_quickstart.py)."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from open_qwen2vl import cli
from open_qwen2vl.data.storage.tars import index_shard
from open_qwen2vl.data.storage.uids import read_uids
from tests.fork_server import forked_programs
from tests.tars import write_caption_tar

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf8")


def blocks(kind: str, heading: str) -> list[str]:
    """The code blocks of a kind below a heading."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{kind}\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(tmp_path, tiny_model, processor):
    """A folder with what the README's commands read."""
    tiny_model.save_pretrained(tmp_path / "runs/quickstart/model")
    processor.save_pretrained(tmp_path / "runs/quickstart/model")
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "emoji.png")
    (tmp_path / "shards").mkdir()
    write_caption_tar(tmp_path / "shards/0.tar", ["a cat", "two dogs run", "blue and green"] * 8)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


def run(command: list[str], place: Path) -> None:
    with forked_programs(place) as path:
        done = subprocess.run(command, cwd=place, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_use_a_model(place, backbones):
    code = "\n".join(blocks("python", "Use a model"))
    # The budgets are those of a 27x27 grid; the tiny tower has 4x4 patches.
    for full, tiny in (("144", "4"), ("729", "16")):
        code = code.replace(f"image_seq_length={full}", f"image_seq_length={tiny}")
    for part, hub_id in (("vision", "google/siglip-so400m-patch14-384"), ("text", "Qwen/Qwen2.5-1.5B-Instruct")):
        assert hub_id in code
        code = code.replace(hub_id, backbones[part])
    run(["python", "-c", code], place)


def test_choose_data(tmp_path, monkeypatch):
    """In this process: each command would import torch anew."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    }
    config["text_cfg"] = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    Path("clip").mkdir()
    save_file(open_clip.CLIP(**config).state_dict(), "clip/open_clip_model.safetensors")
    Path("clip/open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    Path("pool").mkdir()
    captions = ["two dogs run in the green park near the house"] * 39 + ["cats"]
    write_caption_tar(Path("pool/0.tar"), captions, size=(200, 220))
    (commands,) = blocks("bash", "Choose data")
    assert "hf-hub:apple/DFN2B-CLIP-ViT-B-16" in commands
    for command in commands.replace("hf-hub:apple/DFN2B-CLIP-ViT-B-16", "local-dir:clip --device cpu").splitlines():
        program, *argv = shlex.split(command)
        assert (program, cli.main(argv)) == ("open-qwen2vl", 0)
    # The best six, without the caption of one word if it is among them.
    assert len(read_uids("subset.npy")) == len(index_shard("shards/00000.tar").samples) in (5, 6)


def test_pre_train_at_full_size(place, backbones):
    (commands,) = blocks("bash", "Pre-train at full size")
    tiny = f"--vision_model {backbones['vision']} --text_model {backbones['text']} --image_seq_length 4"
    changes = {
        "Qwen/Qwen2.5-1.5B-Instruct --image-seq-length 144 --max-length 4096": f"{backbones['text']} "
        "--image-seq-length 4 --max-length 64",
        "--num_processes 8": "--cpu --num_processes 1",
        "--output_dir runs/2b": f"--output_dir runs/2b {tiny} --max_steps 2 --gradient_accumulation_steps 1 "
        "--dataloader_num_workers 1 --use_cpu",
    }
    for there, here in changes.items():
        assert there in commands
        commands = commands.replace(there, here)
    run(["sh", "-ec", commands], place)
    for name in ("model/model.safetensors", "loss.png", "train_results.json"):
        assert (place / "runs/2b" / name).exists()
    assert (place / "packs/plan.json").exists()


def test_fine_tune_on_conversations(place, tiny_model, processor):
    (commands,) = blocks("bash", "Fine-tune on conversations")
    for part in (tiny_model, processor):
        part.save_pretrained(place / "runs/2b/model")
    (place / "images").mkdir()
    Image.linear_gradient("L").convert("RGB").save(place / "images/cat.png")
    turns = [{"from": "human", "value": "<image>\nwhat is shown?"}, {"from": "gpt", "value": "a cat"}]
    records = [{"id": str(number), "image": "cat.png", "conversations": turns} for number in range(6)]
    (place / "conversations.json").write_text(json.dumps(records))
    changes = {
        "--image-seq-length 729": "--image-seq-length 16",  # the tiny tower's whole grid
        "--num_processes 8": "--cpu --num_processes 1",
        "--output_dir runs/2b-sft": "--output_dir runs/2b-sft --max_steps 1 --gradient_accumulation_steps 1 "
        "--dataloader_num_workers 0 --bf16=false --use_cpu",
    }
    for there, here in changes.items():
        assert there in commands
        commands = commands.replace(there, here)
    run(["sh", "-ec", commands], place)
    assert (place / "runs/2b-sft/model/model.safetensors").exists()
