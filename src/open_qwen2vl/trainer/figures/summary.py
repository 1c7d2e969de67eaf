"""What a whole training did, over all runs that it took."""

from typing import Any

import torch
from transformers import TrainerState

from .throughput import ThroughputCallback, rates


def training_summary(
    counters: ThroughputCallback, state: TrainerState, names: list[str], device: torch.device, world_size: int
) -> dict[str, Any]:
    """What `PackedTrainer.summary` gives, but for the scores of tasks; `train_seconds` without evaluation, saving."""
    totals = dict(counters.totals)
    seconds = totals.pop("seconds")
    speed = rates(totals, seconds, device, world_size)
    del totals["data_wait"]
    evaluated = next((log for log in reversed(state.log_history) if "eval_loss" in log), {})
    shares = counters.shares(names)
    return {
        "steps": state.global_step,
        "epochs": state.epoch,
        **totals,
        "train_seconds": seconds,
        **speed,
        "devices": world_size,
        "final_loss": next((log["loss"] for log in reversed(state.log_history) if "loss" in log), None),
        "eval_losses": {k.removeprefix("eval_"): v for k, v in evaluated.items() if k.startswith("eval_loss")},
        "sources": {
            name: {**source, "share": shares[name]} for name, source in zip(names, counters.sources, strict=False)
        },
        "dropped_documents": counters.dropped,
    }
