"""The micro-batches of an optimizer step, taken as they come, though their loss is divided by the labels of all.

Trainer fetches all of them before the first forward, so that workers load while the device waits, and computes while
they do. Here the plan says how many labels a step has, and each goes to the device when its turn has come:

    loader ─► host, pinned ─► copy on a stream of its own, beside the computing of the one before ─► forward, backward

Where documents could not be read, a step has fewer labels:

    gradients, divided by the labels planned ─► x planned / read ─► clipping, optimizer step
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import reduce, send_to_device
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


class DeviceCopies:
    """Copies batches to a device; of a GPU at most two are there, the one that it computes with and the next.

    The copy of pinned pixels needs neither the host nor what computes. It is asked for when the micro-batch before has
    been queued, and not sooner: a loader that is late would keep the device from that one too.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._queued: torch.cuda.Event | None = None  # behind all that was queued when the last copy was asked for

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with its tensors on the device; other values, grids in lists too, are as they were."""
        if self._stream is None:
            return send_to_device(batch, self._device)
        if self._queued is not None:
            # Only a host that is more than a micro-batch ahead waits here.
            self._queued.synchronize()
        computing = torch.cuda.current_stream(self._device)
        self._queued = computing.record_event(torch.cuda.Event(blocking=True))
        with torch.cuda.stream(self._stream):
            copied = send_to_device(batch, self._device, non_blocking=True)
        computing.wait_stream(self._stream)
        for value in copied.values():
            if isinstance(value, torch.Tensor):
                # Its memory is of the other stream, which would give it away while this one still reads.
                value.record_stream(computing)
        return copied


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
