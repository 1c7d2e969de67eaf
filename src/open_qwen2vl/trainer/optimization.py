"""Which parameters train, at what rate, with what decay, and the schedule without its zeros."""

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel

from .arguments import PackedArguments

# Part of the model by a piece of its parameters' names; whatever has none of them is the language model.
PARTS = {"vision_tower": "vision_tower.", "projector": "multi_modal_projector."}


def choose_trained_parts(model: PreTrainedModel, args: PackedArguments) -> None:
    """Freeze what is not to be trained; a frozen vision tower computes in bf16 where the training does.

    Args:
        model (`PreTrainedModel`): changed in place. In a `PeftModel` the adapter has already chosen.
        args ([`PackedArguments`]): with `train_projector`, `train_language_model` and `train_vision_tower`.
    """
    base = base_model(model)
    if base is model:
        model.requires_grad_(args.train_language_model)
        model.model.multi_modal_projector.requires_grad_(args.train_projector)
        model.model.vision_tower.requires_grad_(args.train_vision_tower)
    tower = base.model.vision_tower
    if args.bf16 and not any(parameter.requires_grad for parameter in tower.parameters()):
        tower.to(torch.bfloat16)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The model itself, or that inside of a `PeftModel` (whose import takes seconds, hence no isinstance).

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model.

    Returns:
        `PreTrainedModel`: without adapter's wrapper.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to.

    Args:
        name (`str`): the parameter's full name.

    Returns:
        `str`: `vision_tower`, `projector` or `language_model`.
    """
    return next((part for part, piece in PARTS.items() if piece in name), "language_model")


def trained_parameters(model: nn.Module) -> dict[str, int]:
    """How many parameters train, by part of the model; those of adapters apart.

    Args:
        model (`nn.Module`): the model, not yet sharded.

    Returns:
        `dict[str, int]`: of `vision_tower`, `projector`, `language_model` and `adapter`.
    """
    counts = dict.fromkeys((*PARTS, "language_model", "adapter"), 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["adapter" if ".lora_" in name else part_of(name)] += parameter.numel()
    return counts


def set_part_learning_rates(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]], args: PackedArguments
) -> list[str]:
    """Split the optimizer's groups by part of the model, where a part has a learning rate of its own.

    Args:
        optimizer (`torch.optim.Optimizer`): before its first step; its groups are replaced.
        named_parameters (`Iterable[tuple[str, nn.Parameter]]`): those of the model.
        args ([`PackedArguments`]): with `<part>_learning_rate`.

    Returns:
        `list[str]`: the part of each group; empty where they are not split.
    """
    rates = {part: getattr(args, f"{part}_learning_rate") for part in (*PARTS, "language_model")}
    if all(rate is None for rate in rates.values()):
        return []
    parts = {parameter: part_of(name) for name, parameter in named_parameters}
    groups, part_of_group = [], []
    for group in optimizer.param_groups:
        for part, rate in rates.items():
            parameters = [parameter for parameter in group["params"] if parts[parameter] == part]
            if parameters:
                groups.append({**group, "params": parameters, "lr": group["lr"] if rate is None else rate})
                part_of_group.append(part)
    optimizer.param_groups = groups
    return part_of_group


def enter_schedule(scheduler: LRScheduler) -> None:
    """Go one step into a schedule that is one step longer than the training.

    transformers' warm-ups start at 0 and its decays end there: a step at either end would train nothing.

    Args:
        scheduler (`LRScheduler`): as it was made; only those of transformers (`LambdaLR`) are changed.
    """
    if isinstance(scheduler, LambdaLR):
        with warnings.catch_warnings():
            # torch warns that no optimizer step came before: that is what is wanted.
            warnings.simplefilter("ignore", UserWarning)
            scheduler.step()


class PartwiseOptimization:
    """The part of [`PackedTraining`] that makes optimizer and schedule; in front of a `Trainer`.

    Attributes:
        part_rates (`dict[str, float]`): `learning_rate/PART` of the last step; empty where all parts have the same.
    """

    def __init__(self, *args, **kwargs):
        self.part_rates: dict[str, float] = {}
        self._part_of_group: list[str] = []
        super().__init__(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Every parameter of two and more dimensions; biases and norms have one.

        Args:
            model (`nn.Module`): the model.

        Returns:
            `list[str]`: their names.
        """
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that `args` names, with the learning rates of the parts.

        Args:
            model (`nn.Module`, *optional*): the trainer's own by default.

        Returns:
            `torch.optim.Optimizer`: the optimizer.
        """
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created:
            named = (self.model if model is None else model).named_parameters()
            self._part_of_group = set_part_learning_rates(optimizer, named, self.args)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """The schedule that `args` names, without the zeros at its ends.

        Args:
            num_training_steps (`int`): steps of the training.
            optimizer (`torch.optim.Optimizer`, *optional*): the trainer's own by default.

        Returns:
            `torch.optim.lr_scheduler.LRScheduler`: the schedule.
        """
        created = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps + 1, optimizer)
        if created:
            enter_schedule(scheduler)
        return scheduler

    def _get_learning_rate(self) -> float:
        # Trainer asks right before the schedule moves on, and logs the first group's alone.
        rates = zip(self._part_of_group, self.lr_scheduler.get_last_lr(), strict=False)
        self.part_rates = {f"learning_rate/{part}": rate for part, rate in rates}
        return super()._get_learning_rate()
