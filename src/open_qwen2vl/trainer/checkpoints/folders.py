"""Checkpoints that are complete or absent, which of them to resume from, and the model for use.

A checkpoint is written to `output_dir/.saving/checkpoint-N`, synced to disk and renamed. What a killed run left there
is removed by the next save. Pruning renames first, too.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi
from transformers import Trainer, TrainingArguments

from ...files import publish_folder, remove_folder
from ...model_folders import checkpoints_by_step
from ..model_card import write_trainer_card
from .completeness import missing_part

logger = logging.getLogger(__name__)

STAGING_NAME = ".saving"
PUSH_NAME = ".pushed"  # what went to the Hub during the training


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are as they were."""


def newest_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The checkpoint to resume from.

    One that lacks a file, or has one cut off, is passed over with a warning: by this trainer checkpoints are whole or
    absent, but copies may not be, and transformers' own Trainer writes in place.

    Args:
        output_dir (`str` or `os.PathLike`): the run's folder; it need not exist.

    Returns:
        `str`: the path of `checkpoint-<step>`, or None where there is no complete one.
    """
    for folder in reversed(checkpoints_by_step(output_dir).values()):
        missing = missing_part(folder)
        if missing is None:
            return str(folder)
        logger.warning("%s is incomplete (%s): not used", folder, missing)
    return None


def prune(output_dir: str | os.PathLike, limit: int | None, keep: str | None) -> None:
    """Delete all but the newest `limit` checkpoints; `keep`, the best, stays in any case and counts."""
    if not limit:
        return
    folders = [f for f in checkpoints_by_step(output_dir).values() if keep is None or str(f) != os.path.normpath(keep)]
    # The newest is never deleted: training resumes from it.
    others = max(1, limit - (keep is not None))
    for folder in folders[:-others]:
        remove_folder(folder)


def save_final_model(trainer: Trainer, folder: str | os.PathLike) -> None:
    """Save model and processor for use; the folder is replaced only when the new one is whole, then it is pushed.

    Args:
        trainer (`Trainer`): after training; every rank must call.
        folder (`str` or `os.PathLike`): the model folder.
    """
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    # What a killed run left must be gone before any rank writes.
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    # On every rank: sharded weights are gathered by a collective.
    with _without_push(trainer.args):
        trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    write_trainer_card(trainer, partial)
    # A pickle of the arguments: nothing that a model folder needs, and nothing that anybody should load.
    (partial / "training_args.bin").unlink(missing_ok=True)
    publish_folder(partial, folder)
    if trainer.args.push_to_hub:
        _push(trainer, folder)


@contextlib.contextmanager
def _without_push(args: TrainingArguments) -> Iterator[None]:
    """Trainer's push after a save uploads all of `output_dir`, with the folder that is being written."""
    asked, args.push_to_hub = args.push_to_hub, False
    try:
        yield
    finally:
        args.push_to_hub = asked


def _push(trainer: Trainer, folder: Path) -> None:
    trainer._finish_current_push()
    HfApi().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=folder,
        commit_message="End of training",
        token=trainer.args.hub_token,
        revision=trainer.args.hub_revision,
        delete_patterns=["training_args.bin"],  # of pushes during training
    )
    shutil.rmtree(Path(trainer.args.output_dir) / PUSH_NAME, ignore_errors=True)
