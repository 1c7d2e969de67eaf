"""How a trainer on packs saves: whole checkpoints in the model's own names, consolidated models for use."""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments

from ...files import publish_folder
from .completeness import STATE_NAME
from .folders import PUSH_NAME, STAGING_NAME, CheckpointError, newest_complete_checkpoint, prune
from .run_record import write_run_record


class Staging:
    """Redirects a trainer's saving to a folder beside the checkpoints, until the new one is whole."""

    def __init__(self):
        self.active = False

    def folder(self, run_folder: str) -> str:
        """Where the trainer writes now."""
        return os.path.join(run_folder, STAGING_NAME) if self.active else run_folder

    def write(
        self,
        final: Path,
        save: Callable[[], None],
        finish: Callable[[Path], None],
        wait: Callable[[], None],
        writer: bool,
    ) -> None:
        """Let `save` on all ranks write `final` elsewhere, and `finish` on the `writer` name them, or leave none."""
        staged = final.parent / STAGING_NAME / final.name
        # What a killed run left must be gone before any rank writes.
        if writer:
            shutil.rmtree(staged.parent, ignore_errors=True)
        wait()
        try:
            self.active = True
            try:
                save()
            finally:
                self.active = False
            wait()
            if writer:
                # All files of all ranks are on disk here, and nobody trains on before they have their name.
                finish(staged)
            wait()
        # A full disk is a RuntimeError to torch, and an error of its own to safetensors.
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(staged.parent, ignore_errors=True)
            newest = newest_complete_checkpoint(final.parent)
            raise CheckpointError(
                f"cannot save {final}: {' '.join(str(error).split())}; "
                + (f"the same command resumes from {newest}" if newest else "there is no checkpoint yet")
            ) from error


@contextlib.contextmanager
def pushed_apart(args: TrainingArguments) -> Iterator[None]:
    """Give the trainer a folder of its own to push from: it uploads all of `output_dir`, whatever lies there."""
    run_folder, args.output_dir = args.output_dir, os.path.join(args.output_dir, PUSH_NAME)
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        yield
    finally:
        args.output_dir = run_folder


def push_to_hub(trainer: Trainer, *args, **kwargs) -> Any:
    """Push model, processor and card as `Trainer.push_to_hub` does, and nothing else of `output_dir`."""
    with pushed_apart(trainer.args):
        return Trainer.push_to_hub(trainer, *args, **kwargs)


def finish_checkpoint(
    final: Path, state: TrainerState, record: dict[str, Any], limit: int | None, staged: Path
) -> None:
    """Mark a written checkpoint, give it its name, and prune older ones to `limit`."""
    # The trainer noted the folder that it wrote to, which is about to be renamed.
    if state.best_model_checkpoint == str(staged):
        state.best_model_checkpoint = str(final)
        state.save_to_json(str(staged / STATE_NAME))
    # Before the rename: a checkpoint without its record would pass for any run.
    write_run_record(staged, record)
    publish_folder(staged, final)
    staged.parent.rmdir()
    prune(final.parent, limit, state.best_model_checkpoint)


@contextlib.contextmanager
def as_class(model: nn.Module, own: type) -> Iterator[None]:
    """FSDP2 gives the model a class made on the spot; the saved code and auto_map must be those of its own."""
    current = type(model)
    model.__class__ = own
    try:
        yield
    finally:
        model.__class__ = current


@contextlib.contextmanager
def own_weight_names(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Save the weights under the model's own names, where its class has others for the Hub.

    A trainer loads a checkpoint by the model's names and takes no notice of what it does not find.
    """
    if not enabled or not isinstance(model, PreTrainedModel):
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained


@contextlib.contextmanager
def consolidated(plugin: Any) -> Iterator[None]:
    """Sharded state is for checkpoints, and those stay as they were configured."""
    configured = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(configured)


def without_tied(names: dict[str, Any] | list[str], model: nn.Module) -> Any:
    """Leave out names of tied weights: consolidated shards hold them twice, and files once."""
    tied = getattr(model, "all_tied_weights_keys", {})
    if isinstance(names, dict):
        return {name: tensor for name, tensor in names.items() if name not in tied}
    return [name for name in names if name not in tied]
