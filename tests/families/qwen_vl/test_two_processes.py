"""PackedTrainer on two gloo processes, DDP and FSDP2, against one: losses, resume, and the folder in the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from open_qwen2vl.families.qwen_vl.processing import QwenVLDocuments
from tests.families.qwen_vl.packs import make_document, mixed_documents
from tests.families.qwen_vl.train_two_processes import main
from tests.qwen_vl import FAMILIES, save_qwen_vl

HERE = Path(__file__).parent
LAUNCHERS = {
    "ddp": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "fsdp2": ["accelerate.commands.launch", "--config_file", str(HERE.parents[1] / "trainer" / "fsdp2.yaml")],
}


def item(documents: list[dict]) -> dict:
    """A pack, as a `PackedDataset` gives it."""
    text = {name: torch.cat([d[name] for d in documents], dim=-1) for name in ("input_ids", "labels", "position_ids")}
    media = {name: torch.cat([d[name] for d in documents]) for name in documents[0] if name not in text}
    patches, number = (
        sum(len(media[name]) for name in names)
        for names in (("pixel_values", "pixel_values_videos"), ("image_grid_thw", "video_grid_thw"))
    )
    return {**text, **media, "media": number, "vision_work": (patches, patches**2, patches // 4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of each family a checkpoint and eight packs; those of the second of two processes have no media."""
    folder = tmp_path_factory.mktemp("two_processes")
    for family in FAMILIES:
        save_qwen_vl(folder / family, family)
        layout = QwenVLDocuments(AutoProcessor.from_pretrained(folder / family))
        documents = mixed_documents(layout)
        packs = []
        for number in range(4):
            packs.append(item([documents[number], documents[number + 5]]))
            packs.append(item([make_document(layout, [f"text {number}"]), make_document(layout, ["more of it"])]))
        torch.save(packs, folder / family / "packs.pt")
    return folder


@pytest.fixture(scope="module")
def one(folder) -> dict:
    return main(folder, "one")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_equal_one(folder, one, launcher):
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], str(HERE / "train_two_processes.py"), str(folder), launcher],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = json.loads((folder / f"{launcher}.json").read_text())
    for family in FAMILIES:
        assert two[family]["losses"] == pytest.approx(one[family]["losses"], rel=1e-5), family
        assert two[family]["resumed"] == two[family]["losses"], family
        assert bool(two[family]["sharded"]) == (launcher == "fsdp2")
        found, expected = (
            load_file(folder / label / family / "model/model.safetensors") for label in (launcher, "one")
        )
        assert set(found) == set(expected) == set(load_file(folder / family / "model.safetensors"))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
