"""Steps that are over: counted, and the training ended where one of them shows that it does no good."""

from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...data.documents.documents import UNREACHABLE
from ..arguments import PackedArguments
from .data_watch import DataStopped, DataWatch
from .loss_watch import LossWatch, stop_training
from .steps import Step
from .throughput import ThroughputCallback


def account(
    steps: Iterable[Step],
    throughput: ThroughputCallback,
    loss_watch: LossWatch,
    data_watch: DataWatch,
    args: PackedArguments,
    describe: Callable[[int], dict[str, Any]] | None,
    last_step: int,
) -> bool:
    """Whether any rank was asked to leave in these steps, or its data are in a bucket that does not answer any more.

    Every rank must call and comes to the same end.
    """
    asked = False
    for step in steps:
        throughput.add(step)
        verdict = loss_watch.verdict(step, args.max_loss_rise)
        if verdict is not None:
            stop_training(step, verdict, describe, args.output_dir)
        verdict = data_watch.verdict(step, args.max_dropped_share, step.number >= last_step)
        data_watch.dead_store = step.places.get(UNREACHABLE, data_watch.dead_store)
        if verdict is not None and data_watch.dead_store is None:
            raise DataStopped(verdict)
        asked = asked or step.stop_requested or data_watch.dead_store is not None
    return asked


class StepEnd(TrainerCallback):
    """Tells a trainer that a step is over, and asks for a log of the last one."""

    def __init__(self, tell: Callable[[], None]):
        self._tell = tell

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """After the optimizer step and before Trainer logs, evaluates and saves."""
        if state.global_step >= state.max_steps:
            control.should_log = True
        self._tell()
