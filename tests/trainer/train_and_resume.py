"""Short trainings one after another, run by `test_two_processes.py` in its own process and by launchers.

Usage: train_and_resume.py FOLDER LABEL RUNS, with RUNS a JSON object of run name to options (see `train`); results go
to FOLDER/LABEL.json, the runs' own files to FOLDER/LABEL/NAME. Launched with an FSDP config it insists on real FSDP2.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from open_qwen2vl import (
    OpenQwen2VLForConditionalGeneration,
    OpenQwen2VLProcessor,
    PackedTrainer,
    PackedTrainingArguments,
)
from open_qwen2vl.families.open_qwen2vl_model import OpenQwen2VLPackedModel
from open_qwen2vl.trainer import fused_step, save_final_model
from open_qwen2vl.trainer.loading import read_packs
from open_qwen2vl.trainer.optimization import part_of

FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"


class TerminateRank(TrainerCallback):
    """SIGTERM to one rank, in the middle of a step."""

    def __init__(self, rank: int, step: int):
        self.rank, self.step = rank, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def make_trainer(folder: Path, output_dir: Path, data: str, **options) -> PackedTrainer:
    """A trainer of the tiny model on `FOLDER/packs.pt` (`packs`) or on the two plans in FOLDER (`mixture`)."""
    torch.manual_seed(0)
    backbones = json.loads((folder / "backbones.json").read_text())
    defaults = {
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "random" if data == "mixture" else "sequential",
        "logging_steps": 1,
        "learning_rate": 1e-3,
        # With the usual 1e-8 a gradient that is nothing but rounding moves its weight a whole step.
        "adam_epsilon": 1e-6,
        "save_strategy": "no",
    }
    args = PackedTrainingArguments(str(output_dir), **{**defaults, **options})
    args.per_device_eval_batch_size = args.per_device_train_batch_size
    if FSDP:
        # accelerate turns FSDP on only for GPUs, and else trains with DDP in silence.
        assert args.world_size > 1
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, image_seq_length=4)
    processor = OpenQwen2VLProcessor.from_vision_text_pretrained(**backbones, image_seq_length=4)
    if options.get("float8"):
        # The tiny model has no layer as large as those that gain by it.
        fused_step._FLOAT8_OUTPUTS = 0
    if data == "mixture":
        sources = [{"path": str(folder / "first")}, {"path": str(folder / "second"), "epochs": 1.5}]
        dataset = read_packs(sources, processor)
    else:
        dataset = torch.load(folder / f"{data}.pt", weights_only=True)
    trainer = PackedTrainer(
        model=model, args=args, train_dataset=dataset, eval_dataset=dataset, processing_class=processor
    )
    assert trainer.is_fsdp_enabled == FSDP
    return trainer


def result(trainer: PackedTrainer) -> dict:
    """What a training came to; `sharded` are the parts of the model with DTensor parameters, by their dtype."""
    parameters = list(trainer.model.named_parameters())
    tower = sum(p.double().abs().sum().item() for name, p in parameters if "vision_tower" in name and p.ndim < 3)
    return {
        **trainer.summary(),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "rates": trainer._get_learning_rate(),
        "evaluation": trainer.evaluate(),
        "sharded": sorted(
            {part_of(name, OpenQwen2VLPackedModel.parts) for name, p in parameters if isinstance(p, DTensor)}
        ),
        "placements": sorted(
            {tuple(type(way).__name__ for way in p.placements) for _, p in parameters if isinstance(p, DTensor)}
        ),
        "tower_dtypes": sorted({str(p.dtype) for name, p in parameters if "vision_tower" in name}),
        "ranks": gather_object(
            [{"step": trainer.state.global_step, "interrupted": trainer.interrupted, "tower": tower}]
        ),
    }


def train(
    folder: Path, output_dir: Path, data: str, resume: str | None = None, stop: dict | None = None, **arguments
) -> dict:
    """One run: from `resume`, a checkpoint in FOLDER, until `stop`, arguments of [`TerminateRank`], or to the end."""
    trainer = make_trainer(folder, output_dir, data, **arguments)
    if stop:
        trainer.add_callback(TerminateRank(**stop))
    stream: set[str] = set()
    block = trainer.model.model.language_model.layers[-1]
    block.register_forward_hook(lambda block, inputs, output: stream.add(str(output.dtype)))
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    found = {**result(trainer), "stream": sorted(stream)}
    if not trainer.interrupted:
        save_final_model(trainer, output_dir / "model")
    return found


def main(folder: Path, label: str, runs: dict[str, dict]) -> dict[str, dict]:
    results = {name: train(folder, folder / label / name, **options) for name, options in runs.items()}
    if PartialState().is_main_process:
        (folder / f"{label}.json").write_text(json.dumps(results))
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
