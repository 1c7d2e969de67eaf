"""What happened in an optimizer step, over all ranks: one small all-reduce a step, read one step late on a GPU.

Ranks decide by it when to stop (SIGTERM, a loss gone wrong), so all of them must see the same figures at the same
step; and logs, which are sums of steps, do not depend on where a run was interrupted.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object, reduce

COUNTS = ("tokens", "positions", "documents", "images", "flops", "dropped", "data_wait")
BY_SOURCE = ("labels", "tokens", "packs")


@dataclass
class Step:
    """One optimizer step."""

    number: int  # the global step that it led to
    loss: float = 0.0  # mean over the labels of all its packs, in nats per token
    grad_norm: float = 0.0  # before clipping
    stop_requested: bool = False  # whether any rank was asked to leave
    # [`COUNTS`] of all ranks; `data_wait` in seconds, summed over ranks
    counts: dict[str, float] = field(default_factory=dict)
    source_losses: list[float] = field(default_factory=list)  # sum of the losses of each source's labels
    sources: list[dict[str, int]] = field(default_factory=list)  # [`BY_SOURCE`] of each source
    rows: list[dict[str, int]] = field(default_factory=list)  # the rows of this rank, as the collator describes them
    row_losses: torch.Tensor | None = None  # sum of the losses of each of these rows' labels
    planned_labels: int | None = None  # on all ranks, where the plan knows
    dropped: Counter = field(default_factory=Counter)  # documents that could not be read, by reason
    places: dict[str, str] = field(default_factory=dict)  # where the first of each reason lies

    @property
    def labels(self) -> int:
        """Labels in it, on all ranks."""
        return sum(source["labels"] for source in self.sources)


class StepMeter:
    """Adds up the micro-batches of a step, then the ranks."""

    def __init__(self, device: torch.device, world_size: int, num_sources: int):
        self.device = device
        self.world_size = world_size
        self.num_sources = num_sources
        self._pending: deque[tuple[Step, torch.Tensor, torch.cuda.Event | None]] = deque()
        self._begin()

    def _begin(self) -> None:
        self._counts: Counter = Counter()
        self._sources = [dict.fromkeys(BY_SOURCE, 0) for _ in range(self.num_sources)]
        self._rows: list[dict[str, int]] = []
        self._row_losses: list[torch.Tensor] = []
        self._dropped: Counter = Counter()
        self._places: dict[str, str] = {}
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.planned_labels: int | None = None  # by which the losses are divided, on all ranks; None: those that are

    @property
    def labels(self) -> int:
        """Labels of this rank so far."""
        return sum(source["labels"] for source in self._sources)

    def wait(self, seconds: float) -> None:
        """Count time in which this rank waited for data."""
        self._counts["data_wait"] += seconds

    def micro_batch(
        self, stats: dict[str, Any], flops: int, loss: torch.Tensor, row_losses: torch.Tensor | None
    ) -> None:
        """Add a micro-batch of this rank: `packing_stats`, its share of the step's loss times ranks, `(rows,)`."""
        self._counts.update({name: stats[name] for name in ("tokens", "positions", "documents", "images")})
        self._counts.update(flops=flops, dropped=sum(stats["dropped"].values()))
        self._dropped.update(stats["dropped"])
        self._places = {**stats.get("dropped_places", {}), **self._places}
        self._loss += loss
        self._rows += stats["rows"]
        self._row_losses.append(
            torch.zeros(len(stats["rows"]), device=self.device) if row_losses is None else row_losses
        )
        for row in stats["rows"]:
            source = self._sources[row["source"]]
            source["labels"] += row["labels"]
            source["tokens"] += row["tokens"]
            source["packs"] += row["tokens"] > 0

    def end_step(self, number: int, grad_norm: torch.Tensor | float, stop_requested: bool) -> None:
        """Send the figures of global step `number` around; every rank must call, `stop_requested` is its own."""
        row_losses = torch.cat(self._row_losses).detach()
        source_of_row = _to_device([row["source"] for row in self._rows], torch.int64, self.device)
        source_losses = torch.zeros(self.num_sources, dtype=torch.float64, device=self.device)
        source_losses.index_add_(0, source_of_row, row_losses.double())
        grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else torch.as_tensor(grad_norm)
        counts = [stop_requested, *(self._counts[name] for name in COUNTS)]
        counts += [source[name] for source in self._sources for name in BY_SOURCE]
        figures = torch.cat(
            [
                torch.stack([self._loss, grad_norm.to(self._loss)]) / self.world_size,
                source_losses,
                _to_device(counts, torch.float64, self.device),
            ]
        )
        if self.world_size > 1:
            figures = reduce(figures, "sum")
        step = Step(number, rows=self._rows, row_losses=row_losses, dropped=self._dropped, places=self._places)
        step.planned_labels = self.planned_labels
        self._pending.append((step, *_to_host(figures)))
        self._begin()

    def finished(self, all_steps: bool) -> Iterator[Step]:
        """Steps whose figures have not been given yet; on a GPU the last is left for later unless `all_steps`."""
        left = 0 if all_steps or self.device.type == "cpu" else 1
        while len(self._pending) > left:
            step, figures, arrived = self._pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            step = self._read(step, iter(figures.tolist()))
            if step.counts["dropped"]:
                _gather_dropped(step)
            yield step

    def _read(self, step: Step, figures: Iterator[float]) -> Step:
        step.loss, step.grad_norm = next(figures), next(figures)
        step.source_losses = [next(figures) for _ in range(self.num_sources)]
        step.stop_requested = bool(next(figures))
        step.counts = {name: next(figures) for name in COUNTS}
        step.sources = [{name: int(next(figures)) for name in BY_SOURCE} for _ in range(self.num_sources)]
        if step.planned_labels not in (None, step.labels):
            if not step.counts["dropped"]:
                raise RuntimeError(f"step {step.number} has {step.labels} labels, its plan says {step.planned_labels}")
            step.loss *= step.planned_labels / max(step.labels, 1)
        return step


def _gather_dropped(step: Step) -> None:
    """Reasons and places of all ranks; they are words, so only when there is something to tell."""
    found = gather_object([(dict(step.dropped), step.places)])
    step.dropped = sum((Counter(dropped) for dropped, _ in found), Counter())
    step.places = {reason: place for _, places in reversed(found) for reason, place in places.items()}


def _to_device(values: list[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copy without waiting for the device, which pageable memory would."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _to_host(figures: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Copy without waiting for the device; the event says when the copy is there."""
    if figures.device.type == "cpu":
        return figures, None
    host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    host.copy_(figures, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived
