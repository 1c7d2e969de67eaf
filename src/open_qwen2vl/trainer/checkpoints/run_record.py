"""What a checkpoint was trained with, so that a resumed run is the same run or refused."""

import json
import os
from enum import Enum
from pathlib import Path
from typing import Any

from ..arguments import PackedArguments

RECORD_NAME = "run.json"

# All that decides what a step does to the weights. How the packs of a step are split over devices does not.
OPTIMISATION = (
    "learning_rate",
    "projector_learning_rate",
    "language_model_learning_rate",
    "vision_tower_learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "train_projector",
    "train_language_model",
    "train_vision_tower",
    "neftune_noise_alpha",
)


def run_record(args: PackedArguments, data: Any) -> dict[str, Any]:
    """Describe a run.

    Args:
        args ([`PackedArguments`]): its arguments.
        data (`Any`): what tells its training data from others, as `PackMixture.fingerprint`; None where nothing does.

    Returns:
        `dict`: can be written as JSON and compared.
    """
    record = {name: getattr(args, name) for name in OPTIMISATION}
    record["packs_per_step"] = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
    record["data"] = data
    return json.loads(json.dumps(record, default=lambda value: value.value if isinstance(value, Enum) else str(value)))


def write_run_record(checkpoint: str | os.PathLike, record: dict[str, Any]) -> None:
    """Put the record into a checkpoint.

    Args:
        checkpoint (`str` or `os.PathLike`): its folder.
        record (`dict`): of [`run_record`].
    """
    (Path(checkpoint) / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def check_same_run(checkpoint: str | os.PathLike, record: dict[str, Any]) -> None:
    """Refuse to continue with other options or other data than the checkpoint was trained with.

    Args:
        checkpoint (`str` or `os.PathLike`): the checkpoint's folder. One of another trainer has no record and passes.
        record (`dict`): of this run.

    Raises:
        ValueError: names every difference.
    """
    path = Path(checkpoint) / RECORD_NAME
    if not path.exists():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    differences = _differences(saved, record)
    if differences:
        raise ValueError(
            f"{checkpoint} was trained with {'; '.join(differences)}. Restore these to continue it, or start a new "
            "run with another output_dir (from these weights: model_name_or_path)"
        )


def _differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in dict.fromkeys([*saved, *now]):
        before, after = saved.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name} {_shown(before)}, now {_shown(after)}")
    return found


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
