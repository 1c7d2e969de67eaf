"""LoRA for this model: low-rank updates of the language model's layers, the projector trained in full.

Module names alone (`q_proj`) would hit vision towers too, whose attention often has the same names; so targets are a
regular expression of full names. What adapts nothing, or something else than asked, is an error and no silent run.
This module needs `peft`.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from ..families import packed_model, part_modules
from ..model_folders import model_folder
from .optimization import LANGUAGE_MODEL, part_of

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")

# For `BitsAndBytesConfig(llm_int8_skip_modules=...)` in QLoRA: what stays as it is, in 4 and in 8 bits, in any family.
UNQUANTISED_MODULES = [*part_modules(), "lm_head"]


def lora_config(
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.05,
    *,
    modules: tuple[str, ...] = ATTENTION_MODULES + MLP_MODULES,
    train_projector: bool = True,
    model: PreTrainedModel | None = None,
    **kwargs,
) -> LoraConfig:
    """The preset: every linear layer of the language model's blocks, and the whole projector.

    Args:
        r (`int`, *optional*, defaults to 16): rank of the updates.
        alpha (`int`, *optional*, defaults to 32): updates are scaled by `alpha / r`.
        dropout (`float`, *optional*, defaults to 0.05): dropout before the updates, in training.
        modules (`tuple[str]`, *optional*): names of the linear layers of a block to adapt.
        train_projector (`bool`, *optional*, defaults to `True`): train the projector in full and save it with the
            adapter.
        model (`PreTrainedModel`, *optional*): whose projector that is; Open-Qwen2VL's where not given.
        kwargs: further options of `peft.LoraConfig`.

    Returns:
        `peft.LoraConfig`: for [`add_lora`], `peft.get_peft_model` or the `peft_config` of a TRL trainer. It has no
        task type, so that the adapted model takes this model's arguments as they are.

    Raises:
        ValueError: for a module that a block of the language model does not have.
    """
    unknown = sorted(set(modules) - set(ATTENTION_MODULES + MLP_MODULES))
    if unknown or not modules:
        raise ValueError(f"modules={modules}: choose from {', '.join(ATTENTION_MODULES + MLP_MODULES)}")
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(modules)})",
        modules_to_save=_projector_modules(model) if train_projector else None,
        **kwargs,
    )


def _projector_modules(model: PreTrainedModel | None) -> list[str]:
    """Names of the modules that make up the projector; PEFT takes none that is a list of modules."""
    found = []
    for full in part_modules("open_qwen2vl" if model is None else model.config.model_type, "projector"):
        name = full.rpartition(".")[2]
        with contextlib.suppress(AttributeError):  # not every model of a family has all of them
            module = None if model is None else model.get_submodule(full)
            many = isinstance(module, nn.ModuleList)
            found += [f"{name}.{index}" for index in range(len(module))] if many else [name]
    return found


def add_lora(model: PreTrainedModel, config: LoraConfig | None = None) -> PeftModel:
    """Put a new adapter on a model; everything else is frozen.

    Args:
        model (`OpenQwen2VLForConditionalGeneration`): changed in place, as by `peft.get_peft_model`.
        config (`peft.LoraConfig`, *optional*): [`lora_config`] by default.

    Returns:
        `peft.PeftModel`: ready to train.

    Raises:
        ValueError: if the adapter would change no module of the language model, one of the vision tower, or if a
            module that it shall train in full does not exist.
    """
    with _without_alias_warning():
        adapted = get_peft_model(model, lora_config() if config is None else config)
    check_targets(adapted)
    return adapted


@contextlib.contextmanager
def _without_alias_warning() -> Iterator[None]:
    """PEFT asks for `is_gradient_checkpointing`, which transformers calls otherwise by now."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def check_targets(model: PeftModel) -> None:
    """Refuse an adapter on the wrong modules, as [`add_lora`] says."""
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    parts = packed_model(model.get_base_model().config).parts
    if not any(part_of(name, parts) == LANGUAGE_MODEL for name in adapted):
        raise ValueError("the adapter changes no module of the language model: no name matches its target_modules")
    if vision := [name for name in adapted if part_of(name, parts) == "vision_tower"]:
        raise ValueError(f"the adapter changes {len(vision)} modules of the vision tower, the first is {vision[0]}")
    whole = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for wanted in model.peft_config[model.active_adapter].modules_to_save or []:
        if not any(name.endswith("." + wanted) for name in whole):
            raise ValueError(f"modules_to_save names {wanted!r}, which the model does not have")


def load_lora(model: PreTrainedModel, adapter: str | os.PathLike, **kwargs) -> PeftModel:
    """Load a saved adapter, and make sure that it does something.

    Args:
        model (`OpenQwen2VLForConditionalGeneration`): the base model, changed in place.
        adapter (`str` or `os.PathLike`): hub id or folder.
        kwargs: passed to `PeftModel.from_pretrained` (`is_trainable`, `revision`, ...).

    Returns:
        `peft.PeftModel`: the adapted model, in evaluation mode unless `is_trainable`.

    Raises:
        ValueError: if the adapter's file lacks weights that the model needs (it was made for another model), or all
            its weights leave the model as it is.
    """
    try:
        with _without_alias_warning():
            # PEFT goes on with fresh weights where it finds none.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, adapter, **kwargs)
    except (KeyError, UserWarning) as error:
        raise ValueError(f"{adapter}: the adapter was made for another model: {error}") from error
    check_targets(adapted)
    if not changes_anything(adapted):
        raise ValueError(f"{adapter}: the adapter changes nothing; it was never trained")
    return adapted


def base_of(adapter: str | os.PathLike) -> str:
    """Hub id or folder of the base model that an adapter names."""
    return model_folder(PeftConfig.from_pretrained(adapter).base_model_name_or_path)


def merged_model(adapter: str | os.PathLike, **options) -> PreTrainedModel:
    """The base model that an adapter's folder names, loaded with `options`, with the updates in its weights."""
    model = AutoModelForImageTextToText.from_pretrained(base_of(adapter), trust_remote_code=False, **options)
    merged = load_lora(model, adapter).merge_and_unload()
    processor = Path(adapter) / "processor_config.json"
    if hasattr(merged.config, "image_seq_length") and processor.exists():
        # The adapter may have been trained with another number of tokens an image.
        budget = json.loads(processor.read_text(encoding="utf-8")).get("image_seq_length")
        merged.config.image_seq_length = budget or merged.config.image_seq_length
    return merged


def changes_anything(model: PeftModel) -> bool:
    """Whether the active adapter's weights differ from those of an adapter that was never trained."""
    name = model.active_adapter
    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.lora_B and module.lora_B[name].weight.any():
            return True
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            own = module.modules_to_save[name].state_dict()
            base = module.original_module.state_dict()
            if any(not torch.equal(own[key].to(value), value) for key, value in base.items()):
                return True
    return False
