"""The figures of an estimate, as a table and as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from .levers import Lever
from .memory import GIB
from .placement import TITLES, Placement
from .time import StepTime

ASSUMED_AS = "as recipes/pretrain.py has it (recipes/sft.py takes bf16 on a GPU)"
SMALL_BYTES = 10 * GIB  # on a GPU; below it the parts are told in MiB


@dataclass
class Estimate:
    """Figures of a run; bytes, seconds and dollars are of all GPUs together unless it says per GPU.

    Attributes:
        gpu (`str`): kind of GPU.
        num_gpus (`int`): their number.
        mfu (`float`): predicted, or assumed where it was given, 0 to 1.
        assumed_mfu (`bool`): whether it was given.
        products (`str`): the type that they are computed in, as bf16.
        assumed_products (`bool`): whether the recipe does not say so.
        parameters (`dict[str, int]`): by part of the model.
        trained (`list[str]`): the parts that train.
        gpu_memory (`float`): bytes of a GPU.
        memory (`dict[str, dict[str, float]]`): bytes on each GPU, as [`step_memory`] gives them, by `one_gpu`, or
            `ddp`, `fsdp2` and, of several machines, `hsdp`.
        layout (`str`): that of the predicted time, the simplest that fits with the recipe's micro-batch.
        packs_per_micro_batch (`int`): on a GPU.
        time ([`StepTime`], *optional*): of a step, as predicted; None where it is not computed in bf16.
        levers (`list[Lever]`): the recipe as it is, then with options that make it faster; none without `time`.
        placement ([`Placement`], *optional*): the best layout of the step that fits; None where none does.
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
    assumed_mfu: bool
    products: str
    assumed_products: bool
    parameters: dict[str, int]
    trained: list[str]
    gpu_memory: float
    memory: dict[str, dict[str, float]]
    layout: str
    packs_per_micro_batch: int
    time: StepTime | None
    levers: list[Lever]
    placement: Placement | None
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
        parts = [self._model_lines(), self._memory_lines()]
        if self.time is not None:
            parts += [self._time_lines(self.time), self._lever_lines()]
        parts.append(self._run_lines())
        return "\n\n".join("\n".join(lines) for lines in parts)

    def _model_lines(self) -> list[str]:
        lines = [f"{'parameters':<16}{sum(self.parameters.values()):>15,}"]
        for part, number in self.parameters.items():
            lines.append(
                f"  {part.replace('_', ' '):<14}{number:>15,}  {'trains' if part in self.trained else 'frozen'}"
            )
        return lines

    def _memory_lines(self) -> list[str]:
        sums = [sum(parts.values()) for parts in self.memory.values()]
        unit, size = ("GiB", GIB) if max(sums) > SMALL_BYTES else ("MiB", 2**20)
        lines = [f"{unit + ' on each GPU':<16}" + "".join(f"{TITLES[name]:>10}" for name in self.memory)]
        for part in next(iter(self.memory.values())):
            figures = [parts[part] / size for parts in self.memory.values()]
            if any(round(figure, 1) for figure in figures):
                lines.append(f"  {part:<14}" + "".join(f"{figure:>10,.1f}" for figure in figures))
        lines.append(f"  {'together':<14}" + "".join(f"{figure / size:>10,.1f}" for figure in sums))
        verdicts = ["fits" if figure <= self.gpu_memory else "too much" for figure in sums]
        capacity = f"{self.gpu_memory / size:,.1f}"
        lines.append(f"  of {capacity:<11}" + "".join(f"{verdict:>10}" for verdict in verdicts))
        return lines

    def _time_lines(self, time: StepTime) -> list[str]:
        title = f"ms, {TITLES[self.layout]}"
        parts = ("products", "attention", "operators", "casts", "gathers", "loading", "micro_batch")
        figures = [(name.replace("_", "-"), getattr(time, name)) for name in parts]
        figures += [(f"x {time.accumulation}", time.accumulation * time.micro_batch)]
        figures += [("exchange", time.exchange), ("optimizer", time.optimizer), ("step", time.step)]
        lines = [f"  {name:<14}{1e3 * seconds:>10,.1f}" for name, seconds in figures if round(1e3 * seconds, 1)]
        return [f"{title:<16}{'predicted':>10}", *lines]

    def _lever_lines(self) -> list[str]:
        """A row for each lever: time of a pack on a GPU, MFU, time of the run, and what it gains."""
        packs, first = self.packs_per_step / self.num_gpus, self.levers[0]
        lines = [f"{'with':<41}{'ms a pack':>10}{'MFU':>6}{'time':>12}{'gain':>6}"]
        for lever in self.levers:
            gain = f"{1 - lever.seconds / first.seconds:.0%}" if lever.options else ""
            time = duration(self.steps * lever.seconds / 3600)
            name = lever.options or "the recipe as it is"
            lines.append(f"  {name:<39}{1e3 * lever.seconds / packs:>10,.1f}{lever.mfu:>6.0%}{time:>12}{gain:>6}")
        return lines

    def _run_lines(self) -> list[str]:
        figures = self.as_dict()
        lines = {
            "steps": f"{self.steps:,} of {self.packs_per_step:,} packs",
            "tokens": f"{self.tokens:.3g}, {self.images:.3g} images",
            "FLOPs": f"{self.flops:.3g}, {figures['flops_per_step']:.3g} a step",
            "speed": f"{self.tokens_per_second:,.0f} tokens/s, {self.images_per_second:,.1f} images/s "
            f"on {self.num_gpus} x {self.gpu}",
            "time": f"{duration(self.hours)}, {_short(figures['gpu_hours'])} GPU-hours",
            "cost": "no price is known for this kind of GPU: give --price-per-hour"
            if self.price_per_hour is None
            else f"${figures['cost']:,.{2 if figures['cost'] < 10 else 0}f}",
            "MFU": f"{self.mfu:.0%}, {'assumed (--mfu)' if self.assumed_mfu else 'predicted: not measured on a GPU'}",
        }
        if self.assumed_products:
            lines["products"] = f"in {self.products}, {ASSUMED_AS}: the recipe does not say bf16"
        if self.price_per_hour is not None:
            lines["price"] = f"${self.price_per_hour:.2f} a GPU-hour ({self.price_source})"
        nothing = f"nothing fits {self.gpu_memory / GIB:,.1f} GiB: take more GPUs, larger ones or LoRA"
        lines["advice"] = str(self.placement or nothing)
        return [f"{name:<11}{value}" for name, value in lines.items()]


def duration(hours: float) -> str:
    """A time in the unit that suits it: seconds, minutes or hours."""
    seconds = 3600 * hours
    if seconds < 90:
        return f"{_short(seconds)} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{hours:,.1f} h"


def _short(number: float) -> str:
    """One decimal, or two digits that count where that would be 0."""
    return f"{number:,.1f}" if number >= 1 or not number else f"{number:.2g}"
