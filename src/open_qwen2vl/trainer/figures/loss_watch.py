"""Stops a training whose loss is no number, or far above what it was, and says which samples were in the step."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ...files import write_json
from .steps import Step
from .throughput import saved_attributes

AVERAGED_STEPS = 50  # about so many steps weigh in the running average
FIRST_STEPS = 20  # the loss may do anything in these
NAMED_PACKS = 3  # in the message; the file has all


class TrainingStopped(RuntimeError):
    """A training that does no good was ended; the message says why and where."""


class LossStopped(TrainingStopped):
    """A step's loss was not finite or rose too far."""


class LossWatch(TrainerCallback, ExportableState):
    """The running average of the loss and the verdict on each step; its state is in the checkpoint."""

    def __init__(self):
        self.average = 0.0
        self.steps = 0

    def state(self) -> dict[str, Any]:
        """What the checkpoint's `trainer_state.json` holds of this callback."""
        return {"args": {}, "attributes": {"average": self.average, "steps": self.steps}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Take up the average of the checkpoint that training resumes from."""
        for name, value in saved_attributes(self, state).items():
            setattr(self, name, value)

    def verdict(self, step: Step, max_rise: float) -> str | None:
        """What is wrong with a step, if anything; a sound one with labels is taken into the average."""
        for name in ("loss", "grad_norm"):
            if not math.isfinite(getattr(step, name)):
                return f"the {name} of step {step.number} is {getattr(step, name)}"
        if step.labels and max_rise and self.steps >= FIRST_STEPS and step.loss > self.average + max_rise:
            return (
                f"the loss of step {step.number} is {step.loss:.4f}, more than max_loss_rise ({max_rise:g}) above the "
                f"average {self.average:.4f} of the steps before it"
            )
        if not step.labels:
            return None
        self.steps += 1
        self.average += (step.loss - self.average) / min(self.steps, AVERAGED_STEPS)
        return None


def stop_training(
    step: Step, verdict: str, describe: Callable[[int], dict[str, Any]] | None, output_dir: str | os.PathLike
) -> None:
    """End the training with a [`LossStopped`] that names the worst packs; every rank must call.

    `output_dir/stopped-at-step-N.json` gets all packs of the step; `describe` gives source and documents of one.
    """
    own = [
        {"pack": row["pack"], "loss": loss / max(row["labels"], 1)}
        for row, loss in zip(step.rows, step.row_losses.tolist(), strict=True)
        if row["tokens"]
    ]
    packs = sorted(gather_object(own), key=lambda pack: (math.isfinite(pack["loss"]), -pack["loss"]))
    path = Path(output_dir) / f"stopped-at-step-{step.number}.json"
    if describe is not None:
        packs = [{**pack, **describe(pack["pack"])} for pack in packs]
    if int(os.environ.get("RANK", 0)) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"reason": verdict, "packs": packs}, default=str)
    worst = "; ".join(_in_words(pack) for pack in packs[:NAMED_PACKS])
    raise LossStopped(f"{verdict}; worst packs: {worst}; all of the step's samples: {path}")


def _in_words(pack: dict[str, Any]) -> str:
    words = f"{pack.get('source', 'pack')} {pack.get('number', pack['pack'])} (loss {pack['loss']:.4f}"
    documents = pack.get("documents", [])
    if documents:
        words += f", {len(documents)} samples from {'/'.join(map(str, documents[0]))}"
    return words + ")"
