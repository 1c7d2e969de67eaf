"""The model card (`README.md`) of a trained model: what it learned from, how, how long, with which versions.

Everything is read from the trainer, or from what the training left behind: `train_results.json` of the run,
`plan.json` of the packs, the model's own config. What is not known is left out, never guessed.
"""

import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import Trainer, TrainingArguments

from ..files import write_text
from ..places import place
from .optimization import base_model

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
    "ema_decay",
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

{architecture}

## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}"{remote})
processor = AutoProcessor.from_pretrained("{name}"{remote})
```
{notes}{sections}"""

_NOTES = {
    "open_qwen2vl": "\nWith the package `open-qwen2vl` installed, `import open_qwen2vl` takes the place of "
    "`trust_remote_code=True`.\n",
    "adapter": "\nThis is a LoRA adapter of {base}; loading it needs `peft` and loads the base model too.\n",
}


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
    """Write the text of a model card from the files that a training left.

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
    config = _read_json(Path(folder) / "config.json")
    tables = {}
    if plan is not None:
        tables["Training data"] = data_table(_read_json(plan))
    if results is not None:
        tables["Training"] = training_table(_read_json(results))
    tables["Hyper-parameters"] = hyperparameters or {}
    tables["Versions"] = library_versions() if results is not None else {}
    bases = base_backbones(config) if base_models is None else base_models
    return _render(config, name, name.rsplit("/", 1)[-1], tables, bases, license)


def trainer_card(trainer: Trainer, name: str | None = None, license: str | None = None) -> str:
    """The text of a model card of a run as it is now; `name` is a hub id, by default the run's or its folder."""
    args, model = trainer.args, base_model(trainer.model)
    config = model.config.to_dict()
    plans = {source.name: place(source.path) / "plan.json" for source in getattr(trainer.train_dataset, "sources", ())}
    single = len(plans) == 1
    tables = {
        "Training data" if single else f"Training data: {source}": data_table(_read_json(path))
        for source, path in plans.items()
    }
    tables["Training"] = training_table(trainer.summary())
    tables["Hyper-parameters"] = training_hyperparameters(args)
    tables["Versions"] = library_versions()
    origin = model.config._name_or_path
    bases = [origin] if _is_hub_id(origin) else base_backbones(config)
    name = name or trainer.hub_model_id or args.hub_model_id
    title = (name or Path(args.output_dir).resolve().name).rsplit("/", 1)[-1]
    name = name or str(Path(args.output_dir) / "model")
    adapter = (origin or "its base model") if trainer.model is not model else None
    return _render(config, name, title, tables, bases, license, adapter)


def write_trainer_card(
    trainer: Trainer, folder: str | os.PathLike, name: str | None = None, license: str | None = None
) -> None:
    """Put [`trainer_card`] into a folder as `README.md`, on the main process."""
    if trainer.is_world_process_zero():
        _write(Path(folder), trainer_card(trainer, name, license))


def write_model_card(folder: str | os.PathLike, name: str, **kwargs) -> Path:
    """Write `README.md` into a model folder, which `hf upload` or `HfApi.upload_folder` then publishes with it.

    Args:
        folder (`str` or `os.PathLike`): the model folder.
        name (`str`): hub id of the model.
        kwargs: as for [`model_card`].

    Returns:
        `Path`: the file.
    """
    return _write(Path(folder), model_card(folder, name, **kwargs))


def _write(folder: Path, text: str) -> Path:
    path = folder / "README.md"
    write_text(path, text)
    return path


def base_backbones(config: dict[str, Any]) -> list[str]:
    """Hub ids of the two backbones in a model's config, language model first; without those from a folder."""
    names = [config.get(part, {}).get("_name_or_path", "") for part in ("text_config", "vision_config")]
    return [name for name in names if _is_hub_id(name)]


def _is_hub_id(name: str | None) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name or "")) and not Path(name).exists()


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
    """Rows on the training data, from the packs' `plan.json`: label to value."""
    totals = plan["totals"]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(totals["skipped"].items()))
    # Families whose images differ in size have no such number.
    budget = plan.get("image_seq_length", plan.get("vision", {}).get("image_seq_length"))
    return {
        "Shards": totals["shards"],
        "Samples read": totals["samples"],
        "Samples left out": skipped or "none",
        "Documents": totals["documents"],
        "Images": totals["images"],
        **({"Tokens per image": budget} if budget is not None else {}),
        "Packs": totals["packs"],
        "Positions per pack": plan["max_length"],
        "Filled": f"{totals['fill']:.2%}",
        "Text format": plan["text_format"],
    }


def training_table(results: dict[str, Any]) -> dict[str, Any]:
    """Rows on the course of the training, from its summary (`train_results.json`): label to value."""
    hours, devices = results["train_seconds"] / 3600, results["devices"]
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(results["dropped_documents"].items()))
    rows = {
        "Steps": results["steps"],
        "Epochs": f"{results['epochs'] or 0:.4g}",
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
    """Python and the installed ones of `LIBRARIES`, in this process."""
    versions = {"Python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def _render(
    config: dict[str, Any],
    name: str,
    title: str,
    tables: dict[str, dict[str, Any]],
    bases: list[str],
    license: str | None,
    adapter: str | None = None,
) -> str:
    ours = config["model_type"] == "open_qwen2vl"
    header = ModelCardData(
        license=license,
        library_name="transformers" if adapter is None else "peft",
        pipeline_tag="image-text-to-text",
        base_model=bases or None,
        tags=[config["model_type"], *(["lora"] if adapter else [])],
    )
    notes = _NOTES["open_qwen2vl"] if ours else ""
    if adapter:
        notes += _NOTES["adapter"].format(base=adapter if _is_hub_id(adapter) else f"`{adapter}`")
    return _CARD.format(
        header=header.to_yaml(),
        title=title,
        name=name,
        architecture=_architecture(config),
        remote=", trust_remote_code=True" if ours else "",
        notes=notes,
        sections="".join(f"\n## {title}\n\n{_table(rows)}\n" for title, rows in tables.items() if rows),
    )


def _architecture(config: dict[str, Any]) -> str:
    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    language = f"{text.get('num_hidden_layers')} blocks of width {text.get('hidden_size')}"
    if config["model_type"] != "open_qwen2vl":
        return f"A vision-language model of transformers' `{config['model_type']}`, its language model has {language}."
    size = f"{vision['image_size']} px" if "image_size" in vision else "native resolution"
    return (
        "A vision-language model of the [Open-Qwen2VL](https://arxiv.org/abs/2504.00595) architecture: "
        f"a vision tower ({vision['model_type']}) of width {vision['hidden_size']} at {size}, a projector "
        f"to {config['image_seq_length']} tokens an image, a language model ({text['model_type']}) of "
        f"{language}."
    )


def _read_json(path: str | os.PathLike) -> Any:
    return json.loads(place(path).read_text(encoding="utf-8"))


def _table(rows: dict[str, Any]) -> str:
    # bool is an int: it must not be printed as a number.
    cells = {k: f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else str(v) for k, v in rows.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in cells.items())])
