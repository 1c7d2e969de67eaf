"""Which parameters train, at what rate, with what decay, and the schedule without its zeros."""

import re
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel

from .arguments import PackedArguments
from .options import MUON

# What belongs to none of a family's parts.
LANGUAGE_MODEL = "language_model"
# Prefixes of parameter names, as a family tells them.
Parts = Mapping[str, str | tuple[str, ...]]
# What wrappers put before a parameter's own name: DDP, a compiler, PEFT.
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|base_model\.model\.)+")


def base_model(model: nn.Module) -> PreTrainedModel:
    """The model itself, or that inside of a `PeftModel` (whose import takes seconds, hence no isinstance)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def part_of(name: str, parts: Parts) -> str:
    """The part of the model that a parameter belongs to: the first whose prefix its name has."""
    own = _WRAPPERS.sub("", name)
    return next((part for part, prefix in parts.items() if own.startswith(prefix)), LANGUAGE_MODEL)


def choose_trained_parts(model: nn.Module, args: PackedArguments, parts: Parts) -> None:
    """Freeze what is not to be trained; a frozen vision tower computes in bf16 where the training does.

    In a `PeftModel` the adapter has already chosen.
    """
    if base_model(model) is model:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(getattr(args, f"train_{part_of(name, parts)}"))
    tower = [parameter for name, parameter in model.named_parameters() if part_of(name, parts) == "vision_tower"]
    if args.bf16 and not any(parameter.requires_grad for parameter in tower):
        for parameter in tower:
            # Parameters alone: rotary frequencies are buffers and must stay in fp32.
            parameter.data = parameter.data.to(torch.bfloat16)


def check_what_trains(model: nn.Module, args: PackedArguments) -> None:
    """Raise ValueError for an optimizer or an average that cannot be made of the weights that train."""
    if args.optim == MUON and base_model(model) is not model:
        raise ValueError("optim muon is for whole matrices, an adapter's are factors of one: use adamw_torch_fused")
    if args.ema_decay is not None:
        dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        if dtypes != {torch.float32}:
            raise ValueError("ema_decay needs weights in float32 (dtype): in 16 bits an average stands still")


def trained_parameters(model: nn.Module, parts: Parts) -> dict[str, int]:
    """How many parameters train, by part of the model, before it is sharded; those of adapters apart."""
    counts = dict.fromkeys((*parts, LANGUAGE_MODEL, "adapter"), 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["adapter" if ".lora_" in name else part_of(name, parts)] += parameter.numel()
    return counts


def decayed_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of two and more dimensions; biases and norms have one."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def set_part_learning_rates(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    args: PackedArguments,
    parts: Parts,
) -> list[str]:
    """Split the groups of a new optimizer by part of the model, where a part has a learning rate of its own.

    Returns the part of each group; nothing where they are not split.
    """
    rates = {part: getattr(args, f"{part}_learning_rate") for part in (*parts, LANGUAGE_MODEL)}
    if all(rate is None for rate in rates.values()):
        return []
    owners = {parameter: part_of(name, parts) for name, parameter in named_parameters}
    groups, part_of_group = [], []
    for group in optimizer.param_groups:
        for part, rate in rates.items():
            parameters = [parameter for parameter in group["params"] if owners[parameter] == part]
            if parameters:
                # A tensor for torchao's optimizers, one of its own for each group.
                lr = group["lr"].clone() if isinstance(group["lr"], torch.Tensor) else group["lr"]
                if rate is not None:
                    lr = lr.fill_(rate) if isinstance(lr, torch.Tensor) else rate
                groups.append({**group, "params": parameters, "lr": lr})
                part_of_group.append(part)
    optimizer.param_groups = groups
    return part_of_group


def rates_by_part(part_of_group: list[str], scheduler: LRScheduler) -> dict[str, float]:
    """`learning_rate/PART` of the step that was just made; empty where all parts have the same."""
    if not part_of_group:
        return {}
    rates = zip(part_of_group, scheduler.get_last_lr(), strict=False)
    return {f"learning_rate/{part}": float(rate) for part, rate in rates}


def enter_schedule(scheduler: LRScheduler) -> None:
    """Go one step into a schedule that is one step longer than the training; only transformers' own are changed.

    Their warm-ups start at 0 and their decays end there: a step at either end would train nothing.
    """
    if isinstance(scheduler, LambdaLR):
        with warnings.catch_warnings():
            # torch warns that no optimizer step came before: that is what is wanted.
            warnings.simplefilter("ignore", UserWarning)
            scheduler.step()


def drop_gradients(model: nn.Module) -> None:
    """Optimizers leave a parameter without gradient alone: no decay, no momentum, no count of steps."""
    for parameter in model.parameters():
        parameter.grad = None
