"""Benchmarks during training: the model in memory answers tasks of lmms-eval, on all ranks, at steps of a schedule.

Training does not notice: mode, random generators and throughput counters are as they were afterwards.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tqdm
from torch import nn
from transformers import ProcessorMixin, Trainer

from .arguments import PackedArguments
from .optimization import base_model

logger = logging.getLogger(__name__)

# Of a task that names no longest answer: a model that has not learnt to end one would write a thousand tokens.
MAX_NEW_TOKENS = 128
SECONDS = "eval_tasks_seconds"


class TaskEvaluation:
    """Runs `eval_tasks` on a model."""

    def __init__(self, args: PackedArguments, processor: Any, sharded: bool):
        self.args = args
        self.processor = processor
        self.ran_at = 0
        if not args.eval_tasks:
            return
        if sharded:
            raise ValueError(
                "eval_tasks needs whole weights on each device and does not run under FSDP or DeepSpeed: use DDP, or "
                "`open-qwen2vl evaluate` on the checkpoints"
            )
        if not isinstance(processor, ProcessorMixin):
            raise ValueError("eval_tasks needs the model's processor as processing_class")
        from ..evaluation.evaluate import find_tasks

        find_tasks(**_options(args))

    def are_due(self, step: int, last_step: int, evaluates: bool) -> bool:
        """Whether they run after this step; `evaluates` tells whether an evaluation of packs does."""
        every = self.args.eval_tasks_steps
        if not self.args.eval_tasks or step == self.ran_at:
            return False
        return (step % every == 0 if every else evaluates) or step >= last_step

    def run(self, model: nn.Module, step: int) -> dict[str, float]:
        """Scores of the model as it is, by `eval_TASK_METRIC`, and `eval_tasks_seconds`; every rank must call.

        A task that fails is a warning. Results lie in `output_dir/eval_tasks/step-N`, as of `open-qwen2vl evaluate`.
        """
        from ..evaluation.evaluate import evaluate_loaded
        from ..evaluation.runs import TasksFailed

        begin, self.ran_at = time.perf_counter(), step
        with without_bars():
            try:
                results = evaluate_loaded(
                    base_model(model),
                    self.processor,
                    output=Path(self.args.output_dir) / "eval_tasks" / f"step-{step}",
                    batch_size=self.args.eval_tasks_batch_size,
                    max_new_tokens=MAX_NEW_TOKENS,
                    name=f"step-{step}",
                    **_options(self.args),
                )
            except TasksFailed as error:
                logger.warning("step %d: %s", step, error)
                results = error.results
        scores = {SECONDS: round(time.perf_counter() - begin, 2)}
        for name, entry in results["tasks"].items():
            metric = entry["main_metric"]
            scores[f"eval_{name}_{metric}"] = entry["metrics"][metric]["value"]
        return scores


def evaluate_tasks(trainer: Trainer) -> dict[str, float]:
    """Run `eval_tasks` on the model as it is evaluated and log `eval_TASK_METRIC` of each; every rank must call."""
    model, average = trainer.model, trainer._average
    # An adapter's wrapper has autocast in its own forward, which `generate` of the model inside does not call.
    with trainer.throughput.paused(), trainer.accelerator.autocast(), average.in_model(model):
        scores = trainer._tasks.run(model, trainer.state.global_step)
    due = trainer.control.should_log
    trainer.log(scores)
    # Which a log clears: the training's own is still to come.
    trainer.control.should_log = due
    return scores


def _options(args: PackedArguments) -> dict[str, Any]:
    from ..evaluation.few_shot import FewShot

    return {
        "tasks": [name.strip() for name in args.eval_tasks.split(",") if name.strip()],
        "limit": args.eval_tasks_limit,
        "include_path": [args.eval_tasks_path] if args.eval_tasks_path else [],
        "few_shot": None if args.eval_tasks_shots is None else FewShot((args.eval_tasks_shots,), (0,)),
    }


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """No new bars of tqdm: lmms-eval's would be written into the training's, and it has no option against them."""
    bar, make = tqdm.std.tqdm, tqdm.std.tqdm.__init__

    def quiet(self, *args, **kwargs) -> None:
        make(self, *args, **{**kwargs, "disable": True})

    bar.__init__ = quiet
    try:
        yield
    finally:
        bar.__init__ = make


def latest_scores(log_history: list[dict[str, float]]) -> dict[str, float]:
    """The latest scores by `eval_TASK_METRIC`; none where none was logged."""
    return next((scores for log in reversed(log_history) if (scores := logged_scores(log))), {})


def logged_scores(log: dict[str, float]) -> dict[str, float]:
    """The scores of a log of tasks by `eval_TASK_METRIC`; none of another log."""
    if SECONDS not in log:
        return {}
    return {name: score for name, score in log.items() if name.startswith("eval_") and name != SECONDS}
