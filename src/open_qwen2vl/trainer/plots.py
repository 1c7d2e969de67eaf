"""The loss plot of a training, from the trainer's log history alone."""

import os
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_loss(log_history: list[dict[str, float]], path: str | os.PathLike) -> None:
    """Write a PNG with the loss by step, smoothed and as logged, the evaluation loss if any, and the learning rate.

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
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    upper.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="loss")
    upper.plot(steps, smooth(losses), color="tab:blue", linewidth=1.8, label="loss, smoothed")
    evaluations = [(log["step"], log["eval_loss"]) for log in log_history if "eval_loss" in log]
    if evaluations:
        upper.plot(*zip(*evaluations, strict=True), color="tab:orange", marker="o", markersize=4, label="evaluation")
    upper.set_ylabel("loss (nats per token)")
    upper.legend(frameon=False)
    lower.plot(steps, [log["learning_rate"] for log in train], color="tab:gray")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    lower.set_ylim(bottom=0)
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    temporary = Path(f"{os.fspath(path)}.partial")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def smooth(losses: np.ndarray) -> np.ndarray:
    """Exponential moving average over about a thirtieth of the run, without the bias of its start.

    Args:
        losses (`np.ndarray` of shape `(logs,)`): losses as logged.

    Returns:
        `np.ndarray` of shape `(logs,)`: smoothed losses.
    """
    keep = 1 - 2 / (max(5, len(losses) / 30) + 1)
    averages, average, weight = [], 0.0, 0.0
    for loss in losses:
        average, weight = keep * average + (1 - keep) * loss, keep * weight + (1 - keep)
        averages.append(average / weight)
    return np.array(averages)
