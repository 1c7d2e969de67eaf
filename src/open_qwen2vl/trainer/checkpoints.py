"""The folders that a training leaves behind: which checkpoint to continue from, and the model for use."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

logger = logging.getLogger(__name__)


def newest_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The checkpoint to continue from.

    A checkpoint's `trainer_state.json` is written last: where it is missing or cut off, the run was killed while it
    saved, and the folder is passed over with a warning. It is overwritten when training comes by again.

    Args:
        output_dir (`str` or `os.PathLike`): the run's folder; it need not exist.

    Returns:
        `str`: the path of `checkpoint-<step>`, or None where there is no complete one.
    """
    folders = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", folder.name):
            folders[int(match[1])] = folder
    for _, folder in sorted(folders.items(), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s is incomplete (no whole %s): not used", folder, TRAINER_STATE_NAME)
            continue
        return str(folder)
    return None


def save_final_model(trainer: Trainer, folder: str | os.PathLike) -> None:
    """Save model and processor for use; the folder is replaced only when the new one is whole.

    Args:
        trainer (`Trainer`): after training; every rank must call.
        folder (`str` or `os.PathLike`): the model folder.
    """
    folder = Path(folder)
    partial, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("partial", "old"))
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    # A pickle of the arguments: nothing that a model folder needs, and nothing that anybody should load.
    (partial / "training_args.bin").unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
