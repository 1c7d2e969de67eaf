"""How a run is laid out on its GPUs: a copy of the model on each or shards, packs at a time, recomputation.

What costs nothing is tried first. DDP exchanges gradients once a step, FSDP2 gathers weights in every micro-batch;
computing activations again costs a third of a step, or a sixth for every second block; fewer packs at a time cost a
little of the GPU's rate. The first that fits is taken, with as many packs at a time as fit.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from .memory import GIB, MicroBatch, Training, step_memory

ROOM = 0.95  # of the memory, for packs fuller than planned
MOST_PACKS = 8  # at a time: a GPU is busy with fewer
_EVERY = {0: "", 2: ", activation checkpointing of every second layer", 1: ", activation checkpointing"}
_TITLES = {"one_gpu": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2"}


@dataclass(frozen=True)
class Placement:
    """One way to lay out the optimizer step of a recipe.

    Attributes:
        layout (`str`): `one_gpu`, `ddp` or `fsdp2`.
        batch_size (`int`): `per_device_train_batch_size`.
        accumulation (`int`): `gradient_accumulation_steps`.
        checkpoint_every (`int`): every n-th layer is computed again; 0 for none.
        bytes (`float`): of memory on each GPU.
        reason (`str`): why not one that costs less; empty for the cheapest.
    """

    layout: str
    batch_size: int
    accumulation: int
    checkpoint_every: int
    bytes: float
    reason: str

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        packs = f"{self.batch_size} pack{'s' * (self.batch_size > 1)} at a time x {self.accumulation}"
        return f"{_TITLES[self.layout]}, {packs}{_EVERY[self.checkpoint_every]}{reason}"


def best_placement(
    config: PreTrainedConfig,
    training: Training,
    micro_batch: Callable[[int], MicroBatch],
    packs_per_gpu: int,
    num_gpus: int,
    capacity: float,
    counts: dict[str, int],
) -> Placement | None:
    """The cheapest layout that fits, for the same `packs_per_gpu` of a step; None where none does.

    `micro_batch` is what a GPU works on with so many packs at a time, `capacity` its memory in bytes, `counts` the
    model's [`parameters_by_part`].
    """
    too_large: dict[str, str] = {}
    for every in _EVERY:
        for layout in ("ddp", "fsdp2") if num_gpus > 1 else ("one_gpu",):
            for packs in _batch_sizes(packs_per_gpu):
                planned = replace(training, checkpoint_every=every, accumulation=packs_per_gpu // packs)
                used = sum(
                    step_memory(config, planned, micro_batch(packs), num_gpus, layout == "fsdp2", counts).values()
                )
                if used <= ROOM * capacity:
                    reason = "; ".join(too_large.values())
                    return Placement(layout, packs, planned.accumulation, every, used, reason)
            title = f"{_TITLES[layout]}{_EVERY[every].replace(', ', ' with ') or ' without activation checkpointing'}"
            too_large[layout] = f"{title} takes {used / GIB:,.1f} GiB"
    return None


def _batch_sizes(packs_per_gpu: int) -> list[int]:
    return [packs for packs in range(min(MOST_PACKS, packs_per_gpu), 0, -1) if packs_per_gpu % packs == 0]
