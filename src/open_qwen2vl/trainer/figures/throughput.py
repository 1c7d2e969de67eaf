"""What a training run achieves: loss, tokens and images per second, TFLOP/s, MFU, waiting, fill, dropped documents.

Figures are those of a logging window, the steps since the last log; evaluation and checkpoints are not in its time.
Window and totals travel in the checkpoint, so that a resumed run logs what an undisturbed one would have.
"""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .flops import peak_flops
from .steps import BY_SOURCE, Step

WORK = ("tokens", "positions", "documents", "images", "flops", "data_wait")


def rates(work: dict[str, float], seconds: float, device: torch.device, world_size: int) -> dict[str, float]:
    """Work of all ranks to speed: tokens and images of all ranks, TFLOP/s and MFU (where known) of one device.

    `data_wait` becomes the part of the time in which a rank waited for its loader, `fill` is tokens by positions.
    """
    seconds = max(seconds, 1e-9)
    flops_per_device = work["flops"] / seconds / world_size
    figures = {
        "tokens_per_second": work["tokens"] / seconds,
        "images_per_second": work["images"] / seconds,
        "tflops_per_second": flops_per_device / 1e12,
        "data_wait": work["data_wait"] / seconds / world_size,
        "fill": work["tokens"] / max(work["positions"], 1),
    }
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return figures if peak is None else {**figures, "mfu": flops_per_device / peak}


def sum_over_ranks(values: list[float], device: torch.device, world_size: int) -> list[float]:
    """Sums over ranks, every one of which must call; whole numbers stay exact up to 2**53."""
    if world_size == 1:
        return values
    return reduce(torch.tensor(values, dtype=torch.float64, device=device), "sum").tolist()


def saved_attributes(callback: ExportableState, state: TrainerState) -> dict[str, Any]:
    """The attributes that a callback resumes with: those in the checkpoint, or new ones where there is none."""
    new = type(callback)().state()
    saved = new if state.global_step == 0 else state.stateful_callbacks.get(type(callback).__name__, new)
    return saved["attributes"]


class ThroughputCallback(TrainerCallback, ExportableState):
    """Adds up the steps of a run; [`PackedTraining`] feeds it and puts its figures into every training log."""

    def __init__(self):
        self.totals = dict.fromkeys((*WORK, "seconds"), 0)  # of all ranks, since the first step of the first run
        self.sources: list[dict[str, int]] = []  # `labels`, `tokens` and `packs` of each, likewise
        self.dropped: dict[str, int] = {}  # lost documents by reason; one met in every epoch counts each time
        self.window = _new_window()  # what the next log is made of
        self._resumed_at, self.is_paused = time.perf_counter(), False

    def state(self) -> dict[str, Any]:
        """What the checkpoint's `trainer_state.json` holds of this callback."""
        names = ("totals", "sources", "dropped", "window")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def add(self, step: Step) -> None:
        """Add a step; one without a label has no loss."""
        window = self.window
        if step.labels:
            window["losses"].append(step.loss)
        for name in WORK:
            window[name] += step.counts[name]
            self.totals[name] += step.counts[name] if name == "data_wait" else int(step.counts[name])
        if not self.sources:
            self.sources = [dict.fromkeys(BY_SOURCE, 0) for _ in step.sources]
        if not window["sources"]:
            window["sources"] = [[0.0, 0] for _ in step.sources]
        for total, part, loss, counts in zip(
            self.sources, window["sources"], step.source_losses, step.sources, strict=True
        ):
            for name in BY_SOURCE:
                total[name] += counts[name]
            part[0] += loss
            part[1] += counts["labels"]
        if step.dropped:
            self.dropped = dict(Counter(self.dropped) + step.dropped)

    def close_window(self, device: torch.device, world_size: int, names: Sequence[str]) -> dict[str, float]:
        """End the window at this moment and open the next.

        Its figures are `loss`, [`rates`], since the start `train_seconds` and `dropped_documents`, and where there are
        several sources `loss/NAME` of the window and `share/NAME`, the part of all tokens so far.
        """
        self._add_time()
        window, self.window = self.window, _new_window()
        figures = {
            "loss": sum(window["losses"]) / max(len(window["losses"]), 1),
            **rates(window, window["seconds"], device, world_size),
            "train_seconds": self.totals["seconds"],
            "dropped_documents": sum(self.dropped.values()),
        }
        if len(names) > 1:
            for name, (loss, labels) in zip(names, window["sources"], strict=False):
                if labels:
                    figures[f"loss/{name}"] = loss / labels
            figures |= {f"share/{name}": share for name, share in self.shares(names).items()}
        return figures

    def shares(self, names: Sequence[str]) -> dict[str, float]:
        """The part of all tokens so far that each source gave, 0 to 1 by name."""
        tokens = max(sum(source["tokens"] for source in self.sources), 1)
        return {name: source["tokens"] / tokens for name, source in zip(names, self.sources, strict=False)}

    def _add_time(self) -> None:
        now = time.perf_counter()
        self.window["seconds"] += now - self._resumed_at
        self.totals["seconds"] += now - self._resumed_at
        self._resumed_at = now

    @contextmanager
    def paused(self):
        """Time in here is not training: evaluation, checkpoints."""
        self._add_time()
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused, self._resumed_at = False, time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Take up the totals of the checkpoint that training resumes from."""
        for name, value in saved_attributes(self, state).items():
            setattr(self, name, value)
        self._resumed_at = time.perf_counter()


def _new_window() -> dict[str, Any]:
    return {"losses": [], "sources": [], "seconds": 0.0, **dict.fromkeys(WORK, 0)}
