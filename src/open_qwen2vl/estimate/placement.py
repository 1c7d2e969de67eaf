"""How a run is laid out on its GPUs: a copy of the model on each or shards, packs at a time, recomputation.

All ways that fit are timed (`time.py`), and the first is taken that costs at most 5 % more than the fastest: no
recomputation before some; DDP, which exchanges gradients once a step, before HSDP, which gathers weights within a
machine in every micro-batch, and that before FSDP2 over all GPUs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .memory import GIB, MicroBatch, Training, step_memory
from .time import Roofline

ROOM = 0.92  # of the memory: 8 % stay for packs fuller than planned, and for what no count reaches
MOST_PACKS = 8  # at a time: a GPU is busy with fewer
SIMPLER = 1.05  # so much longer may a simpler way take
# Kernels of collectives take part of a GPU beside its computing, which the roofline does not know.
BESIDE_COLLECTIVES = 1.1
EVERY = {0: "", 2: ", activation checkpointing of every second layer", 1: ", activation checkpointing"}
TITLES = {"one_gpu": "one GPU", "ddp": "DDP", "hsdp": "HSDP", "fsdp2": "FSDP2"}


@dataclass(frozen=True)
class Placement:
    """One way to lay out the optimizer step of a recipe.

    Attributes:
        layout (`str`): `one_gpu`, `ddp`, `hsdp` or `fsdp2`.
        batch_size (`int`): `per_device_train_batch_size`.
        accumulation (`int`): `gradient_accumulation_steps`.
        checkpoint_every (`int`): every n-th layer is computed again; 0 for none.
        bytes (`float`): of memory on each GPU.
        seconds (`float`): of an optimizer step, as predicted.
        reason (`str`): why not a simpler way; empty for the simplest.
    """

    layout: str
    batch_size: int
    accumulation: int
    checkpoint_every: int
    bytes: float
    seconds: float
    reason: str = ""

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        packs = f"{self.batch_size} pack{'s' * (self.batch_size > 1)} at a time x {self.accumulation}"
        return f"{TITLES[self.layout]}, {packs}{EVERY[self.checkpoint_every]}{reason}"

    @property
    def cost(self) -> float:
        """Seconds of a step, with what collectives take beside it."""
        return self.seconds * (BESIDE_COLLECTIVES if self.layout in ("hsdp", "fsdp2") else 1)


def best_placement(
    roofline: Roofline,
    training: Training,
    micro_batch: Callable[[int], MicroBatch],
    packs_per_gpu: int,
    capacity: float,
) -> Placement | None:
    """The simplest of the fastest layouts that fit, for the same `packs_per_gpu` of a step; None where none does.

    `micro_batch` is what a GPU works on with so many packs at a time, `capacity` its memory in bytes.
    """
    ways = [
        list(_placements(roofline, training, micro_batch, packs_per_gpu, layout, every))
        for every in EVERY
        for layout in roofline.layouts
    ]
    best = [_fastest(way, ROOM * capacity) for way in ways]
    fitting = [each for each in best if each is not None]
    if not fitting:
        return None
    enough = SIMPLER * min(each.cost for each in fitting)
    chosen = next(number for number, each in enumerate(best) if each is not None and each.cost <= enough)
    passed = zip(ways[:chosen], best[:chosen], strict=True)
    # Of each layout the last that was looked at.
    reasons = {way[-1].layout: _why_not(way[-1], each, best[chosen]) for way, each in passed}
    return replace(best[chosen], reason="; ".join(reasons.values()))


def _placements(
    roofline: Roofline,
    training: Training,
    micro_batch: Callable[[int], MicroBatch],
    packs_per_gpu: int,
    layout: str,
    every: int,
) -> Iterator[Placement]:
    """Most packs at a time first."""
    for packs in range(min(MOST_PACKS, packs_per_gpu), 0, -1):
        if packs_per_gpu % packs == 0:
            planned = replace(training, checkpoint_every=every, accumulation=packs_per_gpu // packs)
            used = layout_memory(roofline, planned, micro_batch(packs), layout)
            seconds = roofline.step(layout, planned, packs).step
            yield Placement(layout, packs, planned.accumulation, every, sum(used.values()), seconds)


def layout_memory(roofline: Roofline, training: Training, batch: MicroBatch, layout: str) -> dict[str, float]:
    """[`step_memory`] of a layout."""
    shards, sharded = roofline.shards(layout), layout in ("hsdp", "fsdp2")
    return step_memory(roofline.config, training, batch, shards, sharded, roofline.counts)


def _fastest(way: list[Placement], room: float) -> Placement | None:
    return min((each for each in way if each.bytes <= room), key=lambda each: each.cost, default=None)


def _why_not(smallest: Placement, fitting: Placement | None, chosen: Placement) -> str:
    title = TITLES[smallest.layout]
    title += EVERY[smallest.checkpoint_every].replace(", ", " with ") or " without activation checkpointing"
    if fitting is None:
        return f"{title} takes {smallest.bytes / GIB:,.1f} GiB"
    return f"{title} takes {fitting.cost / chosen.cost - 1:.0%} longer"
