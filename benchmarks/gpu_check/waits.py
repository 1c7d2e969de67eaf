"""Which lines of Python make the host wait for the device, over a whole optimizer step of the trainer.

`torch.cuda.set_sync_debug_mode` warns at each wait; the warning's own line is torch's, so the stack is read instead.
In the backward pass there is no line: such waits count for the line that called it.
"""

import contextlib
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import TrainerCallback

from .models import Bench, build_trainer, release

ACCUMULATION = 2
_OURS = "open_qwen2vl/"


@contextlib.contextmanager
def recorded_waits(found: Counter) -> Iterator[None]:
    """Count the waits that torch warns of, by the line of the project's code that they come from."""

    def note(message, category, filename, lineno, *rest):
        if "synchronizing CUDA operation" in str(message):
            found[_line(traceback.extract_stack()[:-1])] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield


def _line(stack: list[traceback.FrameSummary]) -> str:
    """The innermost line of the project, and the innermost of all where that is another."""
    ours = next((frame for frame in reversed(stack) if _OURS in frame.filename.replace("\\", "/")), None)
    inner = next((frame for frame in reversed(stack) if Path(frame.filename).name != "warnings.py"), stack[-1])
    named = [f"{Path(frame.filename).name}:{frame.lineno} `{frame.line}`" for frame in (ours, inner) if frame]
    return " in ".join(dict.fromkeys(reversed(named)))


class WatchOneStep(TrainerCallback):
    """Warns of waits from the second step's beginning to the third's: logs and checkpoints are not in it."""

    def __init__(self, gpu: bool):
        self.gpu = gpu
        self.watched = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.watched += state.global_step == 1
        if self.gpu:
            torch.cuda.set_sync_debug_mode("warn" if state.global_step == 1 else "default")


def step_waits(bench: Bench) -> dict:
    """Waits of an optimizer step after the first, by line."""
    found: Counter = Counter()
    watch = WatchOneStep(bench.gpu)
    options = {"gradient_accumulation_steps": ACCUMULATION}
    trainer = build_trainer(bench, bench.small_packs(), options, steps=3, callbacks=[watch])
    with recorded_waits(found):
        trainer.train()
    release(trainer)
    lines = "; ".join(f"{line} ({times}x)" for line, times in found.most_common())
    nothing = "none" if bench.gpu else "no device to wait for"
    return {"micro-batches": ACCUMULATION * watch.watched, "waits": found.total(), "lines": lines or nothing}


CASES = {"an optimizer step": step_waits}
