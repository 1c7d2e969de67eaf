"""Two gloo processes against one: same packs in every step, so same losses, weights, counts; DDP and real FSDP2."""

import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from open_qwen2vl import cli
from tests.tars import write_caption_tar

SCRIPT = Path(__file__).with_name("train_and_resume.py")
FSDP = str(SCRIPT.with_name("fsdp2.yaml"))
LAUNCHERS = {
    "ddp": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "fsdp2": ["accelerate.commands.launch", "--config_file", FSDP],
    "fsdp2_three": ["accelerate.commands.launch", "--config_file", FSDP, "--num_processes", "3"],
}
COUNTS = ("steps", "tokens", "documents", "images", "flops", "sources", "dropped_documents")

# Eight steps of four packs, two epochs; a checkpoint lies in the middle of the second.
MIXTURE = {"data": "mixture", "num_train_epochs": 2, "projector_learning_rate": 5e-3, "weight_decay": 0.1}
SAVED = {**MIXTURE, "save_strategy": "steps", "save_steps": 3}
# Sequential packs: the second of two processes gets the odd ones, which have no images.
TOWER = {"data": "packs", "train_vision_tower": True, "max_steps": 3, "optim": "sgd", "learning_rate": 0.05}


def plan(folder: Path, name: str, captions: int, tokenizer: str) -> None:
    """Packs of 40 positions from a tar of captions."""
    rng = random.Random(name)
    words = "a photo of two dogs in the park blue green red circles and squares on mat".split()
    (folder / f"{name}-tars").mkdir()
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(captions)]
    write_caption_tar(folder / f"{name}-tars" / "0.tar", texts, seed=captions)
    options = ["--tokenizer", tokenizer, "--image-seq-length", "4", "--max-length", "40", "--num-workers", "1"]
    assert cli.main(["pack", str(folder / f"{name}-tars"), "--output", str(folder / name), *options]) == 0


def run_here(folder: Path, label: str, runs: dict) -> dict:
    return runpy.run_path(str(SCRIPT))["main"](folder, label, runs)


def launch(launcher: str, folder: Path, runs: dict) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], str(SCRIPT), str(folder), launcher, json.dumps(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / f"{launcher}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_pack, backbones):
    """Packs, plans, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("two_processes")
    packs = [make_pack(1 + 7 * i % 5, seed=i, with_images=i % 2 == 0, dropped={f"rank{i % 2}": 1}) for i in range(12)]
    packs[3] = make_pack(2, seed=3, with_images=False, supervised=False, dropped={"rank1": 1})
    torch.save(packs, folder / "packs.pt")
    (folder / "backbones.json").write_text(json.dumps(backbones))
    plan(folder, "first", 24, backbones["text"])
    plan(folder, "second", 10, backbones["text"])
    run_here(
        folder,
        "one",
        {
            "mixture": {**MIXTURE, "per_device_train_batch_size": 2},
            "tower": TOWER | {"per_device_train_batch_size": 2},
        },
    )
    return folder


def test_debug(folder, backbones):
    import shutil
    shutil.rmtree("/tmp/d_folder", ignore_errors=True)
    shutil.copytree(folder, "/tmp/d_folder")
    shutil.copytree(Path(backbones["vision"]).parent, "/tmp/d_folder/backbones")
    Path("/tmp/d_folder/backbones.json").write_text('{"vision": "/tmp/d_folder/backbones/vision", "text": "/tmp/d_folder/backbones/text"}')
