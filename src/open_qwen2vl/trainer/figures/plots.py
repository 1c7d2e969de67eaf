"""The loss plot of a training, from the trainer's log history alone."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...files import renamed_when_whole
from ..task_evaluation import logged_scores


def plot_loss(log_history: list[dict[str, float]], path: str | os.PathLike) -> None:
    """Write a PNG with the loss by step, smoothed and as logged, the evaluation loss if any, of each source too, the
    scores of `eval_tasks` if any, and the learning rate.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        path (`str` or `os.PathLike`): the PNG; it appears whole or not at all.

    Raises:
        ValueError: if no training loss was logged.
    """
    train = [log for log in log_history if "loss" in log]
    if not train:
        raise ValueError("no training loss in the log history: nothing to plot")
    steps, losses = (np.array([log[name] for log in train]) for name in ("step", "loss"))
    # Without pyplot: no global state, no display, no leaked figure.
    scores = _curves((log["step"], logged_scores(log)) for log in log_history)
    figure = Figure(figsize=(8, 6.5 if scores else 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    heights = [4, 2, 1] if scores else [4, 1]
    upper, *middle, lower = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    upper.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="loss")
    upper.plot(steps, smooth(losses), color="tab:blue", linewidth=1.8, label="loss, smoothed")
    evaluations = [(log["step"], log["eval_loss"]) for log in log_history if "eval_loss" in log]
    if evaluations:
        upper.plot(*zip(*evaluations, strict=True), color="tab:orange", marker="o", markersize=4, label="evaluation")
    sources = _curves((log["step"], _source_losses(log)) for log in log_history)
    # Blue and orange are taken.
    for number, (name, curve) in enumerate(sources.items(), start=2):
        upper.plot(*curve, color=f"C{number}", marker="o", markersize=3, linewidth=1, label=f"evaluation, {name}")
    upper.set_ylabel("loss (nats per token)")
    upper.legend(frameon=False)
    for axes in middle:
        for name, curve in scores.items():
            axes.plot(*curve, marker="o", markersize=4, label=name.removeprefix("eval_"))
        axes.set_ylabel("score")
        axes.legend(frameon=False, fontsize="small")
    lower.plot(steps, [log["learning_rate"] for log in train], color="tab:gray")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    lower.set_ylim(bottom=0)
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes in (upper, *middle, lower):
        _no_scale_of_nothing(axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with renamed_when_whole(Path(path)) as temporary:
        figure.savefig(temporary, format="png")


def _no_scale_of_nothing(axes: Axes) -> None:
    """A constant zero is drawn at the bottom; matplotlib would choose a scale around it that means nothing."""
    if not any(np.any(line.get_ydata()) for line in axes.get_lines()):
        axes.set_ylim(0, 1)


def _source_losses(log: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval_loss/"): loss for name, loss in log.items() if name.startswith("eval_loss/")}


def _curves(points: Iterable[tuple[int, dict[str, float]]]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each name."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for step, values in points:
        for name, value in values.items():
            steps, numbers = curves.setdefault(name, ([], []))
            steps.append(step)
            numbers.append(value)
    return curves


def smooth(losses: np.ndarray) -> np.ndarray:
    """Exponential moving average over about a thirtieth of the run, without the bias of its start: `(logs,)`."""
    keep = 1 - 2 / (max(5, len(losses) / 30) + 1)
    averages, average, weight = [], 0.0, 0.0
    for loss in losses:
        average, weight = keep * average + (1 - keep) * loss, keep * weight + (1 - keep)
        averages.append(average / weight)
    return np.array(averages)
