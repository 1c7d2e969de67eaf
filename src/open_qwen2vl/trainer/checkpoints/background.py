"""Saving of weights, optimizer and average, at once or (`async_save`) from a copy in host memory.

The copies are torch's (DCP's stager); files are the same as ever. Small ones are written at once: config, processor,
schedule, random states, trainer_state.json. Under FSDP2 all ranks write their shards by DCP in their threads, which
talk through a process group of their own, for the training's collectives go on.
"""

import copy
import functools
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import save_fsdp_model
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from .completeness import AVERAGE_NAME
from .saving import as_class, own_weight_names, without_tied

# What accelerate calls the folders of shards.
SHARDED_WEIGHTS, SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"


def save_weights(
    trainer: Trainer, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Save model and processor as `Trainer._save` does, under the model's own class and names of weights."""
    staging, own_class = trainer._staging, trainer._model_class
    if state_dict is not None:
        state_dict = without_tied(state_dict, trainer.model)
    if staging.defers:
        if not trainer.args.should_save:
            return
        # Where it is the best, the trainer looks for the folder.
        os.makedirs(output_dir, exist_ok=True)
        state_dict = _weights(trainer.model) if state_dict is None else in_host_memory(state_dict)
        trainer = copy.copy(trainer)
        # What a thread changes for a moment, class and `save_pretrained`, is not the training's.
        trainer.model = copy.copy(trainer.model)
    in_checkpoint = staging.active

    def write() -> None:
        with as_class(trainer.model, own_class), own_weight_names(trainer.model, in_checkpoint):
            Trainer._save(trainer, output_dir, state_dict)

    staging.run(write)


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights to save, copied where they train; of an adapter's model those alone, all that PEFT takes of it."""
    weights = model.state_dict(keep_vars=True)
    if hasattr(model, "peft_config"):
        weights = {name: weight for name, weight in weights.items() if getattr(weight, "requires_grad", False)}
    frozen = {n: w.detach() for n, w in weights.items() if isinstance(w, nn.Parameter) and not w.requires_grad}
    moving = {name: weight.detach() for name, weight in weights.items() if name not in frozen}
    return {**in_host_memory(moving), **frozen}


def in_host_memory(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a nested state, tensors in host memory, that training does not change; shared ones stay shared."""
    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        return stager.stage(state)
    finally:
        stager.close()


def save_optimizer_and_scheduler(trainer: Trainer, output_dir: str) -> None:
    """Save optimizer, schedule and average of a checkpoint; under FSDP2 the weights, too."""
    if not trainer._staging.defers:
        Trainer._save_optimizer_and_scheduler(trainer, output_dir)
    else:
        if trainer.is_fsdp_enabled:
            _save_shards(trainer, output_dir, SHARDED_WEIGHTS, {"model": get_model_state_dict(trainer.model)})
            optimizer = get_optimizer_state_dict(trainer.model, trainer.optimizer)
            _save_shards(trainer, output_dir, SHARDED_OPTIMIZER, {"optimizer": optimizer})
        elif trainer.args.should_save:
            state = in_host_memory(trainer.optimizer.state_dict())
            trainer._staging.run(functools.partial(torch.save, state, os.path.join(output_dir, OPTIMIZER_NAME)))
        if trainer.args.should_save:
            torch.save(trainer.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))
    if trainer.args.ema_decay is not None:
        _save_average(trainer, os.path.join(output_dir, AVERAGE_NAME))


def _save_average(trainer: Trainer, folder: str) -> None:
    """The average as weights are saved: a model that `from_pretrained` reads, or under FSDP2 shards."""
    with trainer._average.in_model(trainer.model):
        trainer.save_model(folder, _internal_call=True)
        if not trainer.is_fsdp_enabled:
            return
        if trainer._staging.defers:
            _save_shards(trainer, folder, SHARDED_WEIGHTS, {"model": get_model_state_dict(trainer.model)})
        else:
            save_fsdp_model(trainer.accelerator.state.fsdp_plugin, trainer.accelerator, trainer.model, folder)


def _save_shards(trainer: Trainer, output_dir: str, name: str, state: dict[str, Any]) -> None:
    """Let all ranks write their shards of a state to a folder, as accelerate does it."""
    folder = Path(output_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    group = _group()
    write = functools.partial(
        dcp.save, in_host_memory(state), storage_writer=dcp.FileSystemWriter(folder), process_group=group
    )
    trainer._staging.run(write)


@functools.cache
def _group() -> dist.ProcessGroup:
    """All ranks, over gloo: their threads have host memory alone."""
    return dist.new_group(backend="gloo")
