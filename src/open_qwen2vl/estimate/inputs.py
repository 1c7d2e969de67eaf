"""What an estimate starts from: a recipe's options, the configs that they name, and how much there is to read.

Only configs and `plan.json` are read: no weights, no data.
"""

import difflib
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.hf_argparser import string_to_bool

from ..data.packing.mixture import source_phases
from ..data.packing.plan_files import read_plan
from ..data.packing.sources import parse_sources
from ..data.packing.weights import picks_per_epoch
from ..model_folders import model_folder
from ..modeling.configuration_open_qwen2vl import OpenQwen2VLConfig
from ..options import load_yaml
from ..trainer.arguments import PackedTrainingArguments
from ..trainer.options import HONOURED, REFUSED, check_combinations, check_values, every_n_layers
from .memory import PARTS, Training

FORWARD_OPTIONS = ("image_seq_length",)  # of a plan's `vision` what a batch has one of
DEFAULTS = {name: field.default for name, field in PackedTrainingArguments.__dataclass_fields__.items()}
# What recipes/pretrain.py and recipes/sft.py take beside the trainer's options.
RECIPE_OPTIONS = frozenset(
    """
vision_model text_model model_name_or_path model_revision image_seq_length attn_implementation dtype train_packs
eval_packs dataset_name dataset_config dataset_train_split dataset_test_split chat_template use_peft lora_r lora_alpha
lora_dropout lora_target_modules use_rslora use_dora load_in_4bit
""".split()
)
_KNOWN = sorted({*DEFAULTS, *HONOURED, *REFUSED, *RECIPE_OPTIONS})
_BOOLEANS = {name for name, value in DEFAULTS.items() if isinstance(value, bool)}
_BOOLEANS |= {"activation_checkpointing", "gradient_checkpointing", "use_peft"}


@dataclass(frozen=True)
class Work:
    """Packs of an epoch of the run that fill up whole steps together: a source, or what takes its place."""

    packs: float  # each as often as it is read
    tokens: float  # real positions
    images: float
    media_tokens: float  # positions of the images
    labels: float  # labelled positions
    squared_lengths: float  # sum over documents of their length squared
    max_length: int  # positions of a pack
    most_images: float  # images of the pack that has the most
    phase: int = 0  # packs of one fill up whole steps together


def planned_work(train_packs: str | list[dict[str, Any]], epochs: float = 1.0) -> list[Work]:
    """Read what the plans of a recipe's packs add up to in each of so many epochs."""
    sources = parse_sources(train_packs)
    plans = [read_plan(source.path) for source in sources]
    for source, plan in zip(sources, plans, strict=True):
        if not plan["totals"]["packs"]:
            raise ValueError(f"{source.path} holds no packs")
    picks = picks_per_epoch(sources, [plan["totals"]["packs"] for plan in plans], plans, epochs)
    options = [{name: plan["vision"].get(name) for name in FORWARD_OPTIONS} for plan in plans]
    phase_of = {s: number for number, phase in enumerate(source_phases(sources, options)) for s in phase}
    work = []
    for number, (plan, packs) in enumerate(zip(plans, picks, strict=True)):
        totals = plan["totals"]
        times = packs / totals["packs"]
        work.append(
            Work(
                packs=packs,
                tokens=totals["tokens"] * times,
                images=totals["images"] * times,
                media_tokens=_media_tokens(plan) * times,
                labels=totals["labels"] * times,
                squared_lengths=totals["squared_lengths"] * times,
                max_length=plan["max_length"],
                most_images=totals["images_per_pack"][1],
                phase=phase_of[number],
            )
        )
    return work


def _media_tokens(plan: dict[str, Any]) -> float:
    """Positions of a plan's images: one number an image, or by their patches."""
    vision, totals = plan["vision"], plan["totals"]
    if "image_seq_length" in vision:
        return totals["images"] * vision["image_seq_length"]
    return totals["patches"] / vision["merge_size"] ** 2


def assumed_work(
    pairs: float, tokens_per_pair: float, images_per_pair: float, tokens_per_image: float, max_length: int = 4096
) -> list[Work]:
    """The same for image-text pairs that are not planned yet, in full packs; a `ValueError` without room for text."""
    if tokens_per_pair <= images_per_pair * tokens_per_image:
        raise ValueError(
            f"--tokens-per-pair {tokens_per_pair:g} leaves no room for text beside {images_per_pair:g} images of "
            f"{tokens_per_image:g} tokens"
        )
    tokens, images = pairs * tokens_per_pair, pairs * images_per_pair
    media_tokens = images * tokens_per_image
    return [
        Work(
            packs=tokens / max_length,
            tokens=tokens,
            images=images,
            media_tokens=media_tokens,
            labels=tokens - media_tokens,
            squared_lengths=tokens * tokens_per_pair,
            max_length=max_length,
            most_images=max_length / tokens_per_pair * images_per_pair,
        )
    ]


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Options of a recipe's YAML file, as the trainer reads them; a `ValueError` for what it would refuse.

    `bf16` is None where the file does not say it, for the recipes do not agree on what that means.
    """
    options = load_yaml(f"cannot read {path}", path)
    if not isinstance(options, dict):
        raise ValueError(f"{path}: not a YAML file of `option: value` lines")
    for name in options:
        if name not in _KNOWN:
            near = difflib.get_close_matches(str(name), _KNOWN, n=1)
            raise ValueError(f"{path}: no option {name!r}" + f"; near it is {near[0]}" * len(near))
    read = {**DEFAULTS, "bf16": None, **{name: _as_read(name, value) for name, value in options.items()}}
    check_values(SimpleNamespace(**read))
    check_combinations(SimpleNamespace(**read))
    return {"dtype": "float32", **read}


def _as_read(name: str, value: Any) -> Any:
    """A value as the trainer's parser reads it, which takes texts for booleans and numbers."""
    if name in _BOOLEANS and value is not None:
        try:
            return string_to_bool(str(value))
        except ArgumentTypeError:
            raise ValueError(f"{name} must be true or false, got {value!r}") from None
    if name in DEFAULTS and isinstance(value, str):
        for number in (int, float):  # as 1e-4, which is a text in YAML
            try:
                return number(value)
            except ValueError:
                continue
    return value


def read_config(options: dict[str, Any]) -> PreTrainedConfig:
    """The config of the model that a recipe trains; no weights are read."""
    if options.get("model_name_or_path"):
        return _config_of(options, "model_name_or_path")
    if not (options.get("vision_model") and options.get("text_model")):
        raise ValueError("the recipe names no model: give either vision_model and text_model, or model_name_or_path")
    vision = _config_of(options, "vision_model")
    return OpenQwen2VLConfig(
        vision_config=getattr(vision, "vision_config", vision),
        text_config=_config_of(options, "text_model"),
        image_seq_length=options.get("image_seq_length") or 144,
    )


def _config_of(options: dict[str, Any], name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(model_folder(options[name]), trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name} {options[name]}: {error}") from error


def read_training(options: dict[str, Any]) -> Training:
    """What trains and how, for [`step_memory`]."""
    if options.get("use_peft"):
        raise ValueError("use_peft: adapters are not estimated; without it the estimate is for full training")
    dtype = getattr(torch, str(options["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: {options['dtype']!r} is no type of torch, as float32 or bfloat16")
    trained = frozenset(part for part in PARTS if options[f"train_{part}"])
    if not trained:
        raise ValueError("nothing to train: switch on train_projector, train_language_model or train_vision_tower")
    return Training(
        trained=trained,
        dtype=dtype,
        bf16=bool(options["bf16"]),
        optim=str(getattr(options["optim"], "value", options["optim"])),
        accumulation=int(number_of(options, "gradient_accumulation_steps")),
        checkpoint_every=_checkpoint_every(options),
        averaged=options["ema_decay"] is not None,
        fused_by="compiled" if options["torch_compile"] else "kernels" if options["use_liger_kernel"] else "",
        bf16_residual=bool(options.get("bf16_residual")),
        float8=bool(options.get("float8")),
        workers=int(number_of(options, "dataloader_num_workers")),
    )


def _checkpoint_every(options: dict[str, Any]) -> int:
    """Every n-th block is computed again; transformers' older names count where the newer ones are not given."""

    def given(suffix: str) -> tuple[str, Any]:
        new, old = f"activation_checkpointing{suffix}", f"gradient_checkpointing{suffix}"
        name = old if options[new] is None and options[old] is not None else new
        return name, options[name]

    name, kwargs = given("_kwargs")
    if not isinstance(kwargs, dict | None):
        raise ValueError(f"{name} must be options by their names, got {kwargs!r}")
    every = every_n_layers(name, kwargs or {})
    return every if given("")[1] else 0


def number_of(options: dict[str, Any], name: str) -> float:
    """An option that is a number."""
    try:
        return float(options[name])
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {options[name]!r}") from None
