"""How a trainer on packs saves: whole checkpoints in the model's own names, consolidated models for use.

trainer's own methods ─► .saving/checkpoint-N ─► sync, rename ─► checkpoint-N ─► older ones pruned
          └─ async_save: weights and optimizer are copied, and a thread does the rest (background.py)
"""

import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments

from ...files import publish_folder
from .completeness import STATE_NAME
from .folders import PUSH_NAME, STAGING_NAME, CheckpointError, newest_complete_checkpoint, prune
from .run_record import write_run_record

logger = logging.getLogger(__name__)


class Staging:
    """Redirects a trainer's saving to a folder beside the checkpoints, until the new one is whole.

    In the `background` a thread writes what `run` is given, one checkpoint at a time, and the training goes on; its
    error is raised by whoever waits for it next.
    """

    def __init__(self, background: bool = False):
        self.active = False
        self._writer = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._written: Future | None = None
        self._deferred: list[Callable[[], None]] = []

    @property
    def defers(self) -> bool:
        """Whether what is written now is written in the background."""
        return self.active and self._writer is not None

    def folder(self, run_folder: str) -> str:
        """Where the trainer writes now."""
        return os.path.join(run_folder, STAGING_NAME) if self.active else run_folder

    def run(self, write: Callable[[], None]) -> None:
        """Write now, or in the background, from a state that training does not change."""
        self._deferred.append(write) if self.defers else write()

    def write(
        self,
        final: Path,
        save: Callable[[], None],
        finish: Callable[[Path], None],
        wait: Callable[[], None],
        writer: bool,
    ) -> None:
        """Let `save` on all ranks write `final` elsewhere, and `finish` on the `writer` name them, or leave none."""
        self.finish()
        staged = final.parent / STAGING_NAME / final.name
        # What a killed run left must be gone before any rank writes.
        if writer:
            shutil.rmtree(staged.parent, ignore_errors=True)
        wait()
        with _none_left(final, staged):
            self.active = True
            try:
                save()
            finally:
                self.active = False
                deferred, self._deferred = self._deferred, []
            wait()
            if writer:
                # All files of all ranks are on disk here, and nobody trains on before they have their name.
                deferred.append(functools.partial(finish, staged))
            complete = functools.partial(_complete, deferred, final, staged)
            if self._writer is None:
                complete()
                wait()
            else:
                self._written = self._writer.submit(complete)

    def finish(self) -> None:
        """Wait until what is written in the background is whole; `CheckpointError` if it cannot be."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Leave the block only when nothing is written any more."""
        try:
            yield
        except BaseException:
            try:
                self.finish()
            except CheckpointError as error:
                # The block's own error is the one to tell.
                logger.error("%s", error)
            raise
        self.finish()


def _complete(deferred: list[Callable[[], None]], final: Path, staged: Path) -> None:
    with _none_left(final, staged):
        for write in deferred:
            write()


@contextlib.contextmanager
def _none_left(final: Path, staged: Path) -> Iterator[None]:
    """Remove a checkpoint that cannot be written, and say from which the run resumes."""
    try:
        yield
    # A full disk is a RuntimeError to torch, and an error of its own to safetensors and to DCP.
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        if isinstance(error, CheckpointError):
            raise
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
    with pushed_apart(trainer.args), trainer._average.in_model(trainer.model):
        return Trainer.push_to_hub(trainer, *args, **kwargs)


def save_checkpoint(trainer: Trainer, run_folder: Path, save: Callable[[], None], limit: int | None) -> None:
    """Save what the trainer's own `save` writes as a checkpoint, whole or absent; prune to `limit`, push."""
    state, args = trainer.state, trainer.args
    final = run_folder / f"checkpoint-{state.global_step}"
    staged = run_folder / STAGING_NAME / final.name

    def save_and_note() -> None:
        save()
        # The trainer noted the folder that it wrote to, which is about to be renamed.
        if state.best_model_checkpoint == str(staged):
            state.best_model_checkpoint = str(final)
            if args.should_save:
                state.save_to_json(str(staged / STATE_NAME))

    finish = functools.partial(_finish_checkpoint, final, state, trainer.run_record(), limit)
    trainer._staging.write(final, save_and_note, finish, trainer.accelerator.wait_for_everyone, args.should_save)
    if args.push_to_hub:
        trainer._staging.finish()
        trainer._push_from_checkpoint(str(final))


def _finish_checkpoint(
    final: Path, state: TrainerState, record: dict[str, Any], limit: int | None, staged: Path
) -> None:
    """Mark a written checkpoint, give it its name, and prune older ones to `limit`."""
    # Before the rename: a checkpoint without its record would pass for any run.
    write_run_record(staged, record)
    publish_folder(staged, final)
    staged.parent.rmdir()
    # Nobody notes another best before this is over.
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
def consolidated(plugin: Any | None) -> Iterator[None]:
    """Sharded state is for checkpoints, and those stay as they were configured; None where nothing is sharded."""
    if plugin is None:
        yield
        return
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
