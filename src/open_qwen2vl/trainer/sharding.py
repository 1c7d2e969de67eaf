"""DDP and FSDP as packs need them: FSDP really on, version 2, gradients added up in fp32, a frozen tower whole."""

import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, StateDictType
from transformers import Trainer

from ..families.interface import PackedModel
from .arguments import PackedArguments
from .optimization import Parts, base_model, part_of
from .options import MUON


def configure(
    accelerator: Accelerator, fsdp_enabled: bool, model: nn.Module, family: PackedModel, args: PackedArguments
) -> None:
    """Check and complete accelerate's options of DDP and FSDP, before the model is wrapped."""
    check_fsdp_is_on(fsdp_enabled)
    configure_ddp(accelerator.ddp_handler)
    if fsdp_enabled:
        check_state(accelerator.state.fsdp_plugin, model, args)
        configure_fsdp(accelerator.state.fsdp_plugin, model, family)


def check_fsdp_is_on(enabled: bool) -> None:
    """Refuse FSDP that accelerate did not start: it would train with DDP in silence."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not enabled:
        raise ValueError(
            "FSDP was asked for, but accelerate starts it on accelerators only and would train with DDP in "
            "silence; choose a config without FSDP for this machine"
        )


def configure_ddp(handler: Any) -> None:
    """Complete accelerate's options of DDP, where it has any."""
    if handler is not None:
        # Gradients are the buckets that are sent, and not a copy of them: 5.8 GiB of the 2B model.
        handler.gradient_as_bucket_view = True


def configure_fsdp(plugin: Any, model: nn.Module, family: PackedModel) -> None:
    """Complete accelerate's FSDP plugin before the model is wrapped."""
    if plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP version 1 flattens parameters, so that weight decay finds no matrix; use fsdp_version: 2"
        )
    frozen = list(frozen_tower(model, family.parts))
    named = plugin.transformer_cls_names_to_wrap or []
    if not named or not set(named) <= {type(module).__name__ for module in model.modules()}:
        # The config names the blocks of another family, or none.
        named = family.block_classes
    if plugin.ignored_modules is None and frozen:
        # A frozen tower has no gradients to shard: each rank keeps it whole and gathers nothing for it.
        plugin.ignored_modules = "|".join(f"(.*\\.)?{re.escape(name)}" for name in frozen)
    # Nor do its blocks become units without parameters, whose hooks would run in each of them.
    outside = [module for name, module in model.named_modules() if not _within(name, frozen)]
    classes = {type(module).__name__ for module in outside}
    plugin.transformer_cls_names_to_wrap = [name for name in named if name in classes]
    if plugin.mixed_precision_policy is not None:
        # accelerate's policy adds up gradients in bf16, over micro-batches and ranks, and rounds the loss to it.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
        )


def _within(name: str, modules: list[str]) -> bool:
    return any(name == outer or name.startswith(f"{outer}.") for outer in modules)


def check_state(plugin: Any, model: nn.Module, args: PackedArguments) -> None:
    """Refuse an optimizer or a way of saving that does not know shards."""
    if args.optim != MUON and not args.optim_target_modules:
        kind, _ = Trainer.get_optimizer_cls_and_kwargs(args)
        if kind.__module__.startswith("bitsandbytes"):
            name = str(getattr(args.optim, "value", args.optim))
            raise ValueError(f"optim {name} is bitsandbytes', which takes no shards: use DDP or another optimizer")
    if args.async_save and plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT:
        raise ValueError("async_save needs fsdp_state_dict_type: SHARDED_STATE_DICT in accelerate's config")
    for name in ("async_save", "ema_decay"):
        if getattr(args, name) and base_model(model) is not model:
            raise ValueError(f"{name} is not supported for an adapter under FSDP2: use DDP")


def frozen_tower(model: nn.Module, parts: Parts) -> Iterator[str]:
    """Names of the largest modules that hold nothing but frozen parameters of the vision tower."""
    taken: list[str] = []
    for name, module in model.named_modules():
        parameters = [(f"{name}.{inner}", parameter) for inner, parameter in module.named_parameters()]
        if not parameters or _within(name, taken):
            continue
        if all(part_of(full, parts) == "vision_tower" and not p.requires_grad for full, p in parameters):
            taken.append(name)
            yield name
