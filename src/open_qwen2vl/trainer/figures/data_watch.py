"""Stops a training that learns nothing: steps without a single label, or too many documents that cannot be read."""

from collections import Counter
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .loss_watch import TrainingStopped
from .steps import Step
from .throughput import saved_attributes

WINDOW = 1000  # documents
FEW_DROPPED = 20  # a short run may lose so many, whatever their share
EMPTY_STEPS = 10  # in a row


class DataStopped(TrainingStopped):
    """The steps of a training had no labels, or too many of its documents could not be read."""


class DataWatch(TrainerCallback, ExportableState):
    """Counts labels and lost documents; its state is in the checkpoint."""

    def __init__(self):
        self.window: list[list[int]] = []  # documents read and lost in each of the last steps, about WINDOW in all
        self.empty = 0  # steps without a label since the last with one
        self.learned = False  # whether any step had a label
        self.reasons: dict[str, int] = {}  # lost documents of the whole run
        self.places: dict[str, str] = {}  # where the first of each reason lies
        self.dead_store: str | None = None  # what was not to be had of a bucket, which ended the training

    def state(self) -> dict[str, Any]:
        """What the checkpoint's `trainer_state.json` holds of this callback."""
        names = ("window", "empty", "learned", "reasons", "places")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Take up the counts of the checkpoint that training resumes from."""
        self.dead_store = None
        for name, value in saved_attributes(self, state).items():
            setattr(self, name, value)

    def verdict(self, step: Step, max_dropped_share: float, last: bool) -> str | None:
        """What is wrong with the data after this step, the run's `last` or not."""
        self._add(step)
        empty = f"step {step.number} and {self.empty - 1} before it have no label, so that nothing was learned in them"
        if self.empty >= EMPTY_STEPS or (last and not self.learned):
            return f"{empty}; {self._commonest()}"
        read, dropped = (sum(counts) for counts in zip(*self.window, strict=True))
        # Until the window is full the rest of it is taken for sound, but at the end there is no rest.
        documents = read + dropped if last else max(read + dropped, WINDOW)
        if dropped > max(max_dropped_share * documents, FEW_DROPPED if last else 0):
            return (
                f"{dropped} of the last {read + dropped} documents up to step {step.number} could not be read, more "
                f"than max_dropped_share ({max_dropped_share:g}) allows; {self._commonest()}"
            )
        return None

    def doubtful(self, max_dropped_share: float) -> bool:
        """Whether the last steps may be bad ones, so that older checkpoints are worth keeping."""
        read, dropped = (sum(counts) for counts in zip(*self.window, strict=True)) if self.window else (0, 0)
        return self.empty > 0 or dropped > max_dropped_share * (read + dropped)

    def _add(self, step: Step) -> None:
        self.empty = 0 if step.labels else self.empty + 1
        self.learned = self.learned or bool(step.labels)
        self.window.append([int(step.counts["documents"]), int(step.counts["dropped"])])
        while len(self.window) > 1 and sum(map(sum, self.window[1:])) >= WINDOW:
            del self.window[0]
        if step.dropped:
            self.reasons = dict(Counter(self.reasons) + step.dropped)
            self.places = {**step.places, **self.places}

    def _commonest(self) -> str:
        if not self.reasons:
            return "no document was lost, so these documents have nothing to predict: look at their answers"
        reason = max(self.reasons, key=self.reasons.__getitem__)
        where = f", for example {self.places[reason]}" if reason in self.places else ""
        return f"{self.reasons[reason]} of the {sum(self.reasons.values())} lost so far are {reason}{where}"
