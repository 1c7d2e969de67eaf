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
from accelerate.utils import gather_object, reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .flops import peak_flops
from .steps import BY_SOURCE, Step

WORK = ("tokens", "positions", "documents", "images", "flops", "data_wait")


def rates(work: dict[str, float], seconds: float, device: torch.device, world_size: int) -> dict[str, float]:
    """Work done to speed.

    Args:
        work (`dict`): the counts `tokens`, `positions`, `images`, `flops`, and `data_wait` in seconds, of all ranks.
        seconds (`float`): the time that they took.
        device (`torch.device`): the training device.
        world_size (`int`): number of ranks.

    Returns:
        `dict`: `tokens_per_second` and `images_per_second` of all ranks together, `tflops_per_second` of one device,
        `data_wait` (0 to 1: the part of the time in which a rank waited for its loader), `fill` (0 to 1: tokens by
        positions) and `mfu` (0 to 1) where the device's [`peak_flops`] is known.
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
    """Add up figures of all ranks; every rank must call it.

    Args:
        values (`list[float]`): this rank's figures; whole numbers stay exact up to 2**53.
        device (`torch.device`): the training device.
        world_size (`int`): number of ranks.

    Returns:
        `list[float]`: their sums.
    """
    if world_size == 1:
        return values
    return reduce(torch.tensor(values, dtype=torch.float64, device=device), "sum").tolist()


def saved_attributes(callback: ExportableState, state: TrainerState) -> dict[str, Any]:
    """The attributes that training continues with.

    Args:
        callback (`ExportableState`): one of a run's callbacks.
        state (`TrainerState`): the run's state, from a checkpoint or new.

    Returns:
        `dict`: those in the checkpoint, or those of a new callback where there is none.
    """
    new = type(callback)().state()
    saved = new if state.global_step == 0 else state.stateful_callbacks.get(type(callback).__name__, new)
    return saved["attributes"]


class ThroughputCallback(TrainerCallback, ExportableState):
    """Adds up the steps of a run; [`PackedTraining`] feeds it and puts its figures into every training log.

    Attributes:
        totals (`dict`): `tokens`, `positions`, `documents`, `images`, `flops`, `data_wait` of all ranks and `seconds`
            since the first step of the first run.
        sources (`list[dict]`): `labels`, `tokens` and `packs` of each source since then.
        dropped (`dict`): documents that could not be read, by reason; one that is met in every epoch counts each time.
        window (`dict`): what the next log is made of.
    """

    def __init__(self):
        self.totals = dict.fromkeys((*WORK, "seconds"), 0)
        self.sources: list[dict[str, int]] = []
        self.dropped: dict[str, int] = {}
        self.window = _new_window()
        self._resumed_at = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What the checkpoint's `trainer_state.json` holds of this callback."""
        names = ("totals", "sources", "dropped", "window")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def add(self, step: Step) -> None:
        """Add a step; every rank must call.

        Args:
            step ([`Step`]): its figures.
        """
        window = self.window
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
        if step.counts["dropped"]:
            # The reasons are words, so they are gathered only when there is something to tell.
            for reasons in gather_object([dict(step.dropped)]):
                self.dropped = dict(Counter(self.dropped) + Counter(reasons))

    def close_window(self, device: torch.device, world_size: int, names: Sequence[str]) -> dict[str, float]:
        """End the window at this moment and open the next.

        Args:
            device (`torch.device`): the training device.
            world_size (`int`): number of ranks.
            names (`Sequence[str]`): the sources' names.

        Returns:
            `dict`: `loss`, [`rates`], since the start `train_seconds` and `dropped_documents`, and where there are
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
        """The part of all tokens so far that each source gave.

        Args:
            names (`Sequence[str]`): the sources' names.

        Returns:
            `dict[str, float]`: by name, 0 to 1.
        """
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
        try:
            yield
        finally:
            self._resumed_at = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Take up the totals of the checkpoint that training continues from."""
        for name, value in saved_attributes(self, state).items():
            setattr(self, name, value)
        self._resumed_at = time.perf_counter()


def _new_window() -> dict[str, Any]:
    return {"losses": [], "sources": [], "seconds": 0.0, **dict.fromkeys(WORK, 0)}
