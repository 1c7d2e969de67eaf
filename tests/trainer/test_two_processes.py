"""Two gloo processes against one: same batches, so same losses, weights, counts. One rank sees no image at all."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("train_and_resume.py")
LAUNCHERS = {
    "ddp": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "fsdp2": ["accelerate.commands.launch", "--config_file", str(SCRIPT.with_name("fsdp2.yaml"))],
}
COUNTS = ("steps", "tokens", "documents", "images", "flops", "dropped_documents")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_pack, backbones):
    """Packs, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("two_processes")
    # Sequential batches of two: the second process gets the odd packs, which have no images.
    packs = [make_pack(1 + 7 * i % 5, seed=i, with_images=i % 2 == 0, dropped={f"rank{i % 2}": 1}) for i in range(12)]
    packs[3] = make_pack(2, seed=3, with_images=False, supervised=False, dropped={"rank1": 1})
    torch.save(packs, folder / "packs.pt")
    runpy.run_path(str(SCRIPT))["main"](folder, "one", 2, backbones["vision"], backbones["text"])
    return folder


@pytest.mark.parametrize("launcher", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_equal_one(folder, backbones, launcher):
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(SCRIPT), str(folder), launcher, "1"]
    done = subprocess.run(
        [*command, backbones["vision"], backbones["text"]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (json.loads((folder / f"{name}.json").read_text()) for name in ("one", launcher))
    assert (two["whole"]["devices"], one["whole"]["devices"]) == (2, 1)
    for run in ("whole", "resumed"):
        assert two[run]["losses"] == pytest.approx(one[run]["losses"], rel=1e-5)
        assert two[run]["evaluation"]["eval_loss"] == pytest.approx(one[run]["evaluation"]["eval_loss"], rel=1e-5)
        assert two[run]["evaluation"]["eval_dropped_documents"] == 12
        assert {name: two[run][name] for name in COUNTS} == {name: one[run][name] for name in COUNTS}
        assert two[run]["dropped_documents"] == {"rank0": 6, "rank1": 6}
    for each in (one, two):
        assert each["resumed"]["losses"] == each["whole"]["losses"]
        assert each["resumed"]["evaluation"]["eval_loss"] == each["whole"]["evaluation"]["eval_loss"]

    models = [folder / f"{name}-model" for name in ("one", launcher)]
    weights = load_file(models[1] / "model.safetensors")
    for name, parameter in load_file(models[0] / "model.safetensors").items():
        torch.testing.assert_close(weights[name], parameter, rtol=1e-4, atol=1e-6, msg=name)
    assert {path.name for path in models[0].iterdir()} == {path.name for path in models[1].iterdir()}
    assert (models[0] / "config.json").read_text() == (models[1] / "config.json").read_text()
