"""What a run will need, before it starts: memory, speed, hours and cost of a recipe on a kind of GPU.

    inputs.py ─►          options, config ─► parameters, memory of a step (memory.py)
                       └► tokens, images ─► FLOPs (flops.py, as for the MFU) ─► hours ─► cost

The MFU and the price are assumptions, and printed as such.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ..modeling.configuration_open_qwen2vl import OpenQwen2VLConfig
from ..trainer.figures.flops import GPUS, step_flops
from .inputs import PARTS, Work, number_of, read_training
from .memory import GIB, MicroBatch, Training, parameters_by_part, step_memory

# Dollars per GPU-hour on demand, by the vendors' public lists on this day. No list has all kinds.
PRICES = {
    "h100": (3.95, "Modal"),
    "h100-pcie": (2.86, "Lambda"),
    "a100-80gb": (2.50, "Modal"),
    "a100-40gb": (1.48, "Lambda"),
    "l40s": (1.95, "Modal"),
}
PRICES_OF = "2026-05-07"


@dataclass
class Estimate:
    """Figures of a run; bytes, seconds and dollars are of all GPUs together unless it says per GPU.

    Attributes:
        gpu (`str`): kind of GPU.
        num_gpus (`int`): their number.
        mfu (`float`): assumed, 0 to 1.
        parameters (`dict[str, int]`): by part of the model.
        trained (`list[str]`): the parts that train.
        gpu_memory (`float`): bytes of a GPU.
        memory (`dict[str, dict[str, float]]`): bytes on each GPU, as [`step_memory`] gives them, by `one_gpu`, or
            `ddp` and `fsdp2`.
        packs_per_step (`int`): packs of an optimizer step.
        steps (`int`): optimizer steps of the run.
        tokens (`float`): real positions of the run.
        images (`float`): images of the run.
        flops (`float`): of the run.
        tokens_per_second (`float`): all GPUs together.
        images_per_second (`float`): likewise.
        hours (`float`): of the run, without evaluation, checkpoints and restarts.
        price_per_hour (`float`, *optional*): dollars for a GPU-hour.
        price_source (`str`): where the price is from.
    """

    gpu: str
    num_gpus: int
    mfu: float
    parameters: dict[str, int]
    trained: list[str]
    gpu_memory: float
    memory: dict[str, dict[str, float]]
    packs_per_step: int
    steps: int
    tokens: float
    images: float
    flops: float
    tokens_per_second: float
    images_per_second: float
    hours: float
    price_per_hour: float | None
    price_source: str

    def as_dict(self) -> dict[str, Any]:
        """All of it, with what follows from it, for JSON."""
        return {
            **asdict(self),
            "fits": {name: sum(parts.values()) <= self.gpu_memory for name, parts in self.memory.items()},
            "flops_per_step": self.flops / self.steps,
            "gpu_hours": self.hours * self.num_gpus,
            "cost": None if self.price_per_hour is None else self.hours * self.num_gpus * self.price_per_hour,
        }

    def __str__(self) -> str:
        return "\n".join([*self._model_lines(), "", *self._memory_lines(), "", *self._run_lines()])

    def _model_lines(self) -> list[str]:
        lines = [f"{'parameters':<16}{sum(self.parameters.values()):>15,}"]
        for part, number in self.parameters.items():
            lines.append(
                f"  {part.replace('_', ' '):<14}{number:>15,}  {'trains' if part in self.trained else 'frozen'}"
            )
        return lines

    def _memory_lines(self) -> list[str]:
        titles = {"one_gpu": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2"}
        lines = [f"{'GiB on each GPU':<16}" + "".join(f"{titles[name]:>10}" for name in self.memory)]
        for part in next(iter(self.memory.values())):
            figures = [parts[part] / GIB for parts in self.memory.values()]
            if any(figures):
                lines.append(f"  {part:<14}" + "".join(f"{figure:>10.1f}" for figure in figures))
        sums = [sum(parts.values()) for parts in self.memory.values()]
        lines.append(f"  {'together':<14}" + "".join(f"{figure / GIB:>10.1f}" for figure in sums))
        verdicts = ["fits" if figure <= self.gpu_memory else "too much" for figure in sums]
        lines.append(f"  of {self.gpu_memory / GIB:<11.1f}" + "".join(f"{verdict:>10}" for verdict in verdicts))
        return lines

    def _run_lines(self) -> list[str]:
        figures = self.as_dict()
        lines = {
            "steps": f"{self.steps:,} of {self.packs_per_step:,} packs",
            "tokens": f"{self.tokens:.3g}, {self.images:.3g} images",
            "FLOPs": f"{self.flops:.3g}, {figures['flops_per_step']:.3g} a step",
            "speed": f"{self.tokens_per_second:,.0f} tokens/s, {self.images_per_second:,.1f} images/s "
            f"on {self.num_gpus} x {self.gpu}",
            "time": f"{self.hours:,.1f} h, {figures['gpu_hours']:,.1f} GPU-hours",
            "cost": "no price is known for this kind of GPU: give --price-per-hour"
            if self.price_per_hour is None
            else f"${figures['cost']:,.0f}",
            "assumed": f"MFU {self.mfu:.0%} (--mfu)"
            + (
                "" if self.price_per_hour is None else f", ${self.price_per_hour:.2f} a GPU-hour ({self.price_source})"
            ),
        }
        return [f"{name:<11}{value}" for name, value in lines.items()]


def estimate_run(
    options: dict[str, Any],
    config: OpenQwen2VLConfig,
    work: list[Work],
    gpu: str,
    num_gpus: int = 1,
    mfu: float = 0.5,
    price_per_hour: float | None = None,
) -> Estimate:
    """Put it all together.

    Args:
        options (`dict`): from [`read_recipe`].
        config ([`OpenQwen2VLConfig`]): from [`read_config`].
        work (`list[Work]`): an epoch of the run.
        gpu (`str`): a name in `GPUS`.
        num_gpus (`int`, *optional*, defaults to 1): data-parallel GPUs.
        mfu (`float`, *optional*, defaults to 0.5): model FLOPs utilisation to reckon with, 0 to 1.
        price_per_hour (`float`, *optional*): dollars for a GPU-hour; that of a public list where not given.

    Returns:
        [`Estimate`].

    Raises:
        ValueError: for figures that cannot be.
    """
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu} is not known; known are {', '.join(GPUS)}")
    if num_gpus < 1 or not 0 < mfu <= 1:
        raise ValueError(f"--num-gpus must be at least 1 and --mfu within 0 and 1, got {num_gpus} and {mfu}")
    training = read_training(options)
    batch_size = int(number_of(options, "per_device_train_batch_size"))
    packs_per_step = num_gpus * batch_size * training.accumulation
    steps, epochs = _steps(options, work, packs_per_step)
    switches = {f"train_{part}": part in training.trained for part in PARTS}
    flops = epochs * sum(
        step_flops(config, each.tokens, each.squared_lengths, each.images, each.image_seq_length, **switches)
        for each in work
    )
    tokens, images = (epochs * sum(getattr(each, name) for each in work) for name in ("tokens", "images"))
    kind = GPUS[gpu]
    seconds = flops / (num_gpus * kind.peak_flops * mfu)
    price, vendor = PRICES.get(gpu, (None, None)) if price_per_hour is None else (price_per_hour, None)
    return Estimate(
        gpu=gpu,
        num_gpus=num_gpus,
        mfu=mfu,
        parameters=parameters_by_part(config),
        trained=sorted(training.trained),
        gpu_memory=kind.memory * GIB,
        memory=_memory(config, training, work, batch_size, num_gpus),
        packs_per_step=packs_per_step,
        steps=steps,
        tokens=tokens,
        images=images,
        flops=flops,
        tokens_per_second=tokens / seconds,
        images_per_second=images / seconds,
        hours=seconds / 3600,
        price_per_hour=price,
        price_source="--price-per-hour" if vendor is None else f"{vendor}'s list of {PRICES_OF}; --price-per-hour",
    )


def _steps(options: dict[str, Any], work: list[Work], packs_per_step: int) -> tuple[int, float]:
    """Optimizer steps and epochs; sources of one number of tokens per image fill up whole steps together."""
    phases: Counter[int] = Counter()
    for each in work:
        phases[each.image_seq_length] += each.packs
    steps_per_epoch = sum(math.ceil(packs / packs_per_step) for packs in phases.values())
    epochs, max_steps = number_of(options, "num_train_epochs"), int(number_of(options, "max_steps"))
    if max_steps > 0:
        return max_steps, max_steps / steps_per_epoch
    return math.ceil(epochs * steps_per_epoch), epochs


def _memory(
    config: OpenQwen2VLConfig, training: Training, work: list[Work], batch_size: int, num_gpus: int
) -> dict[str, dict[str, float]]:
    """Of full packs, those with the most images and those with the most text."""
    most_text = max((each.tokens - each.images * each.image_seq_length) / each.packs for each in work)
    batch = MicroBatch(
        positions=batch_size * max(each.max_length for each in work),
        images=round(batch_size * max(each.most_images for each in work)),
        labels=round(batch_size * most_text),
        image_seq_length=max(each.image_seq_length for each in work),
    )
    if num_gpus == 1:
        return {"one_gpu": step_memory(config, training, batch)}
    return {
        name: step_memory(config, training, batch, num_gpus, sharded)
        for name, sharded in (("ddp", False), ("fsdp2", True))
    }
