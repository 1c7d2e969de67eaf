"""Where a model lies: a hub id, its folder, or the folder of a training that wrote it. Standard library only."""

import json
import logging
import os
import re
from pathlib import Path

from .places import is_remote

logger = logging.getLogger(__name__)

STATE_NAME = "trainer_state.json"  # transformers' Trainer writes it last into a checkpoint
_MODEL = ("config.json", "adapter_config.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "processor_config.json", "preprocessor_config.json")


def checkpoints_by_step(output_dir: str | os.PathLike) -> dict[int, Path]:
    """The `checkpoint-<step>` folders of a run by step, the oldest first; the run's folder need not exist."""
    folders = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", folder.name):
            folders[int(match[1])] = folder
    return dict(sorted(folders.items()))


def model_folder(name: str | os.PathLike) -> str:
    """Find the model that a name means, all weights or an adapter.

    A training that has ended has it in `output_dir/model`; of one in progress the newest complete checkpoint is taken,
    which is told in one line of the log.

    Args:
        name (`str` or `os.PathLike`): hub id, folder of a model or of a tokenizer, or `output_dir` of a training.

    Returns:
        `str`: the name as it is, or the folder in it where the model lies.

    Raises:
        ValueError: for a folder without a model, naming where it was looked for.
    """
    if is_remote(str(name)):
        raise ValueError(f"{name}: a model is a folder of this machine or a hub id: copy it here first")
    folder = Path(name)
    is_path = folder.is_absolute() or str(name).startswith(".") or len(folder.parts) > 2
    # `runs/x` might be an id of the Hub, but not to somebody who has a folder `runs`.
    if not folder.exists() and (is_path or len(folder.parts) == 2 and folder.parent.is_dir()):
        raise ValueError(f"{name}: there is no such folder")
    if not folder.is_dir() or _has_any(folder, _MODEL + _TOKENIZER):
        return str(name)
    if _has_any(folder / "model", _MODEL):
        return str(folder / "model")
    steps = checkpoints_by_step(folder)
    for checkpoint in reversed(steps.values()):
        if _is_whole(checkpoint):
            if os.environ.get("RANK", "0") == "0":
                logger.warning("%s has no finished model: taking its newest checkpoint, %s", name, checkpoint.name)
            return str(checkpoint)
    places = f"in it, in {folder / 'model'} or in a checkpoint"
    hint = " (sharded checkpoints cannot be loaded; model/ is written when the training ends)" if steps else ""
    raise ValueError(f"{name}: no model (config.json or adapter_config.json, with weights) {places}{hint}")


def is_adapter(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a LoRA adapter alone, which names its base model."""
    return (Path(folder) / "adapter_config.json").exists() and not (Path(folder) / "config.json").exists()


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).exists() for name in names)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return _has_any(checkpoint, _MODEL) and _has_any(checkpoint, _WEIGHTS)
