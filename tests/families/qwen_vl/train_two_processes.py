"""Trainings of the three families, run by `test_two_processes.py` in its own process and by launchers.

Usage: train_two_processes.py FOLDER LABEL, with `packs.pt` and a checkpoint of each family below FOLDER/FAMILY.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl import PackedTrainer, PackedTrainingArguments
from open_qwen2vl.trainer import save_final_model
from tests.qwen_vl import FAMILIES

FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"


def make_trainer(folder: Path, output: Path, packs_a_step: int = 4) -> PackedTrainer:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}
    quiet = {"use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": 0, "optim": "sgd"}
    args = PackedTrainingArguments(
        str(output), train_vision_tower=True, train_sampling_strategy="sequential", **options, **quiet
    )
    args.gradient_accumulation_steps = packs_a_step // args.world_size
    if FSDP:
        # accelerate turns FSDP on only for GPUs, and else trains with DDP in silence.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = PackedTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
        args=args,
        train_dataset=torch.load(folder / "packs.pt", weights_only=True),
        processing_class=AutoProcessor.from_pretrained(folder),
    )
    assert trainer.is_fsdp_enabled == FSDP
    return trainer


def losses(trainer: PackedTrainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def main(folder: Path, label: str) -> dict[str, dict]:
    results = {}
    for family in FAMILIES:
        output = folder / label / family
        trainer = make_trainer(folder / family, output)
        trainer.train()
        save_final_model(trainer, output / "model")
        sharded = sum(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
        resumed = make_trainer(folder / family, output)
        resumed.train(resume_from_checkpoint=str(output / "checkpoint-2"))
        results[family] = {"losses": losses(trainer), "resumed": losses(resumed), "sharded": sharded}
    if PartialState().is_main_process:
        (folder / f"{label}.json").write_text(json.dumps(results))
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
