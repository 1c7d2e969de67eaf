"""The micro-batches of an optimizer step, taken as they come, though their loss is divided by the labels of all.

Trainer fetches all of them before the first forward, so that workers load while the device waits, and computes while
they do. Here the plan says how many labels a step has. Where documents could not be read, it has fewer:

    gradients, divided by the labels planned ─► x planned / read ─► clipping, optimizer step
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn
from torch.distributed.tensor import DTensor

from .figures.steps import StepMeter


class MicroBatches:
    """The next `number` batches of a loader, once; all but the first are fetched when they are asked for."""

    def __init__(self, batches: Iterator[dict[str, Any]], number: int, waited: Callable[[float], None]):
        self._batches, self._number, self._waited = batches, number, waited
        # Now: a loader that starts draws from the random state, which Trainer restores right after this.
        self._first = [self._fetch()]

    def _fetch(self) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            return next(self._batches)
        except StopIteration:
            raise RuntimeError("the loader gave fewer batches than its order has") from None
        finally:
            self._waited(time.perf_counter() - start)

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Popped, for the list would hold its pixels through the step.
        yield self._first.pop()
        for _ in range(1, self._number):
            yield self._fetch()


def correct_gradients(parameters: Iterable[nn.Parameter], meter: StepMeter) -> bool:
    """Make up for labels that were planned and not read, on any rank; all ranks must call.

    Returns whether no rank has read a label.
    """
    planned, read = meter.planned_labels, meter.labels
    if meter.world_size == 1:
        if read not in (0, planned):
            _scale(parameters, planned / read)
        return not read
    total = reduce(torch.full((), float(read), device=meter.device), "sum")
    # By one where nothing is lost, which changes no bit: to find that out would be a wait for the device.
    _scale(parameters, planned / total.clamp(min=1))
    return not read and not total.item()


def _scale(parameters: Iterable[nn.Parameter], factor: float | torch.Tensor) -> None:
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            # Under FSDP2 the shard of this rank.
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor)
