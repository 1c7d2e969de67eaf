"""What a checkpoint was trained with, so that a resumed run is the same run or refused."""

import hashlib
import json
import os
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import PackedArguments
from ..optimization import Parts, base_model, part_of

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
    "bf16_residual",
    "float8",
    "train_projector",
    "train_language_model",
    "train_vision_tower",
    "neftune_noise_alpha",
    "ema_decay",
    "shuffle_window",
)

ADAPTER = (
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "modules_to_save",
    "use_rslora",
    "use_dora",
)
QUANTIZATION = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype")
SAMPLED = 64  # values of a parameter in the hash


def run_record(args: PackedArguments, data: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Describe a run, as JSON that can be compared.

    `data` tells its data from others (None where nothing does), `weights` is that of [`weights_record`].
    """
    record = {name: getattr(args, name) for name in OPTIMISATION}
    record["packs_per_step"] = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
    # By way of JSON, so that a tuple or an enum equals what is read from a checkpoint.
    return json.loads(json.dumps({**record, "data": data, **weights}, default=_plain))


def weights_record(model: nn.Module, parts: Parts) -> dict[str, Any]:
    """What kind of weights a model has, before it is wrapped for training."""
    return {"dtype": _dtypes(model, parts), "quantization": _quantization(model), "adapter": _adapter(model)}


def _dtypes(model: nn.Module, parts: Parts) -> dict[str, str]:
    """The types of each part's weights, adapters apart."""
    found: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            found.setdefault(part_of(name, parts), set()).add(str(parameter.dtype).removeprefix("torch."))
    return {part: " and ".join(sorted(dtypes)) for part, dtypes in sorted(found.items())}


def _quantization(model: nn.Module) -> dict[str, Any] | None:
    config = getattr(base_model(model).config, "quantization_config", None)
    values = config if config is None or isinstance(config, dict) else config.to_dict()
    return values and {name: values[name] for name in QUANTIZATION if name in values}


def _adapter(model: nn.Module) -> dict[str, Any] | None:
    """What the adapter's own weights do not tell: its kind, and the weights that it changes."""
    if not hasattr(model, "peft_config"):
        return None
    config = model.peft_config[model.active_adapter].to_dict()
    return {**{name: config.get(name) for name in ADAPTER}, "base_model_weights": frozen_weights_hash(model)}


def frozen_weights_hash(model: nn.Module) -> str:
    """Tells base models apart: a hash over some values of every frozen parameter that is not quantised.

    A path would not do: folders move, and are written anew.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            values = parameter.detach().reshape(-1)
            # From all over: the first rows of an embedding may well agree between two models.
            some = values[:: max(1, values.numel() // SAMPLED)].cpu().contiguous().view(torch.uint8)
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            # As bytes, since numpy has no bfloat16.
            digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    return value.value if isinstance(value, Enum) else str(value)


def write_run_record(checkpoint: str | os.PathLike, record: dict[str, Any]) -> None:
    """Put the record into a checkpoint's folder."""
    (Path(checkpoint) / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def check_same_run(checkpoint: str | os.PathLike, record: dict[str, Any]) -> None:
    """Refuse to resume with other options or data than a checkpoint was trained with, naming every difference.

    A checkpoint of another trainer has no record and passes; what an older one did not record is not compared.
    """
    path = Path(checkpoint) / RECORD_NAME
    if not path.exists():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    differences = _differences(saved, record)
    if differences:
        raise ValueError(
            f"{checkpoint} was trained with {'; '.join(differences)}. Restore these to resume it, or start a new "
            "run with another output_dir (from these weights: model_name_or_path)"
        )


def _differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    # Within a group (`data`, `adapter`) all names count; at the top an older version knew fewer.
    for name in dict.fromkeys([*saved, *(now if prefix else ())]):
        before, after = saved.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name} {_shown(before)}, now {_shown(after)}")
    return found


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
