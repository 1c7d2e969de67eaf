"""The model card (`README.md`) of a trained model: what it learned from, how, how long, with which versions.

Everything is read from what the training left behind: `train_results.json` of the run, `plan.json` of the packs,
the model's own config. What is not known is left out, never guessed.
"""

import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import TrainingArguments

from ..files import write_text

LIBRARIES = ("open-qwen2vl", "torch", "transformers", "accelerate", "tokenizers", "peft", "trl", "lmms-eval")

HYPERPARAMETERS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "seed",
    "bf16",
    "train_projector",
    "train_language_model",
    "train_vision_tower",
)

_CARD = """---
{header}
---

# {title}

A vision-language model of the [Open-Qwen2VL](https://arxiv.org/abs/2504.00595) architecture: {architecture}.

## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
```

With the package `open-qwen2vl` installed, `import open_qwen2vl` takes the place of `trust_remote_code=True`.
{sections}"""


def model_card(
    folder: str | os.PathLike,
    name: str,
    *,
    license: str,
    results: str | os.PathLike | None = None,
    plan: str | os.PathLike | None = None,
    hyperparameters: dict[str, Any] | None = None,
    base_models: list[str] | None = None,
) -> str:
    """Write the text of a model card.

    Args:
        folder (`str` or `os.PathLike`): the model folder, for its `config.json`.
        name (`str`): hub id of the model (`user/model`).
        license (`str`): hub name of its licence (`apache-2.0`, `mit`, ...).
        results (`str` or `os.PathLike`, *optional*): `train_results.json` of the run.
        plan (`str` or `os.PathLike`, *optional*): `plan.json` of the packs.
        hyperparameters (`dict`, *optional*): as [`training_hyperparameters`] gives them.
        base_models (`list[str]`, *optional*): hub ids of the backbones; those in `config.json` by default.

    Returns:
        `str`: the card, with its YAML header.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=(base_backbones(config) if base_models is None else base_models) or None,
        tags=["open_qwen2vl"],
    )
    tables = {}
    if plan is not None:
        tables["Training data"] = data_table(json.loads(Path(plan).read_text(encoding="utf-8")))
    if results is not None:
        tables["Training"] = training_table(json.loads(Path(results).read_text(encoding="utf-8")))
    tables["Hyper-parameters"] = hyperparameters or {}
    tables["Versions"] = library_versions() if results is not None else {}
    sections = "".join(f"\n## {title}\n\n{_table(rows)}\n" for title, rows in tables.items() if rows)
    return _CARD.format(
        header=data.to_yaml(), title=name.rsplit("/", 1)[-1], name=name, sections=sections, architecture=_parts(config)
    )


def write_model_card(folder: str | os.PathLike, name: str, **kwargs) -> Path:
    """Write `README.md` into a model folder, which `hf upload` or `HfApi.upload_folder` then publishes with it.

    Args:
        folder (`str` or `os.PathLike`): the model folder.
        name (`str`): hub id of the model.
        kwargs: as for [`model_card`].

    Returns:
        `Path`: the file.
    """
    path = Path(folder) / "README.md"
    write_text(path, model_card(folder, name, **kwargs))
    return path


def base_backbones(config: dict[str, Any]) -> list[str]:
    """Hub ids of the two backbones that a model was built from.

    Args:
        config (`dict`): the model's `config.json`.

    Returns:
        `list[str]`: language model and vision tower, without those that came from a folder.
    """
    names = [config.get(part, {}).get("_name_or_path", "") for part in ("text_config", "vision_config")]
    return [name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()]


def training_hyperparameters(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that decide what a training does.

    Args:
        args ([`PackedTrainingArguments`] or another `TrainingArguments`): of the run.

    Returns:
        `dict`: name to value; options that are unset or off by a negative value are left out.
    """
    values = args.to_dict()
    chosen = {name: values[name] for name in HYPERPARAMETERS if values.get(name) is not None}
    if chosen.get("max_steps", 0) < 0:
        del chosen["max_steps"]
    return {**chosen, "devices": args.world_size}


def data_table(plan: dict[str, Any]) -> dict[str, Any]:
    """Rows on the training data.

    Args:
        plan (`dict`): the packs' `plan.json`.

    Returns:
        `dict`: label to value.
    """
    totals = plan["totals"]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(totals["skipped"].items()))
    return {
        "Shards": len(plan["shards"]),
        "Samples read": totals["samples"],
        "Samples left out": skipped or "none",
        "Documents": totals["documents"],
        "Images": totals["images"],
        "Tokens per image": plan["image_seq_length"],
        "Packs": totals["packs"],
        "Positions per pack": plan["max_length"],
        "Filled": f"{totals['fill']:.2%}",
        "Text format": plan["text_format"],
    }


def training_table(results: dict[str, Any]) -> dict[str, Any]:
    """Rows on the course of the training.

    Args:
        results (`dict`): the run's `train_results.json`.

    Returns:
        `dict`: label to value.
    """
    hours, devices = results["train_seconds"] / 3600, results["devices"]
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(results["dropped_documents"].items()))
    rows = {
        "Steps": results["steps"],
        "Epochs": f"{results['epochs']:.4g}",
        "Tokens": results["tokens"],
        "Images": results["images"],
        "Documents dropped at reading": dropped or "none",
        "Hours": f"{hours:.4g} on {devices} device{'s' * (devices > 1)} ({hours * devices:.4g} device-hours)",
        "Tokens per second": f"{results['tokens_per_second']:,.0f}",
        "TFLOP/s per device": f"{results['tflops_per_second']:.4g}",
    }
    if "mfu" in results:
        rows["MFU"] = f"{results['mfu']:.1%}"
    if results["final_loss"] is not None:
        rows["Final training loss"] = f"{results['final_loss']:.4f}"
    return rows


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a training or evaluation runs on.

    Returns:
        `dict`: Python and the installed ones of `LIBRARIES`, in this process.
    """
    versions = {"Python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def _parts(config: dict[str, Any]) -> str:
    text, vision = config["text_config"], config["vision_config"]
    return (
        f"a SigLIP vision tower of width {vision['hidden_size']} at {vision['image_size']} px, a projector to "
        f"{config['image_seq_length']} tokens an image, a Qwen2 language model of {text['num_hidden_layers']} blocks "
        f"of width {text['hidden_size']}"
    )


def _table(rows: dict[str, Any]) -> str:
    # bool is an int: it must not be printed as a number.
    cells = {k: f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else str(v) for k, v in rows.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in cells.items())])
