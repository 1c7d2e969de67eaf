"""Benchmarks during training: the model in memory answers tasks of lmms-eval, on all ranks, at steps of a schedule.

Training does not notice: mode, random generators and throughput counters are as they were afterwards.
"""

import logging
import time
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from .optimization import base_model

logger = logging.getLogger(__name__)

# Of a task that names no longest answer: a model that has not learnt to end one would write a thousand tokens.
MAX_NEW_TOKENS = 128
SECONDS = "eval_tasks_seconds"


class TaskEvaluation:
    """The part of [`PackedTraining`] that runs `eval_tasks`; in front of a `Trainer`.

    Raises:
        ValueError: for tasks that do not exist, a trainer without processor, or sharded weights.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._tasks_ran_at = 0
        if not self.args.eval_tasks:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "eval_tasks needs whole weights on each device and does not run under FSDP or DeepSpeed: use DDP, or "
                "`open-qwen2vl evaluate` on the checkpoints"
            )
        if not isinstance(self.processing_class, ProcessorMixin):
            raise ValueError("eval_tasks needs the model's processor as processing_class")
        from ..evaluation.evaluate import find_tasks

        find_tasks(**self._task_options)

    @property
    def _task_options(self) -> dict[str, Any]:
        from ..evaluation.few_shot import FewShot

        args = self.args
        return {
            "tasks": [name.strip() for name in args.eval_tasks.split(",") if name.strip()],
            "limit": args.eval_tasks_limit,
            "include_path": [args.eval_tasks_path] if args.eval_tasks_path else [],
            "few_shot": None if args.eval_tasks_shots is None else FewShot((args.eval_tasks_shots,), (0,)),
        }

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        # Before a checkpoint is saved, so that its log has these scores.
        if self._tasks_are_due():
            self.evaluate_tasks()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _tasks_are_due(self) -> bool:
        step, every = self.state.global_step, self.args.eval_tasks_steps
        # Who was asked to leave has seconds: the run that goes on has the next ones.
        if not self.args.eval_tasks or step == self._tasks_ran_at or self.interrupted:
            return False
        scheduled = step % every == 0 if every else self.control.should_evaluate
        return scheduled or step >= self.state.max_steps

    def evaluate_tasks(self) -> dict[str, float]:
        """Run the tasks of `eval_tasks` on the model as it is and log their scores; every rank must call.

        A task that fails is a warning. Results lie in `output_dir/eval_tasks/step-N`, as of `open-qwen2vl evaluate`.

        Returns:
            `dict[str, float]`: `eval_TASK_METRIC` of each task's main metric, and `eval_tasks_seconds`.
        """
        from ..evaluation.evaluate import evaluate_loaded
        from ..evaluation.runs import TasksFailed

        begin, step = time.perf_counter(), self.state.global_step
        self._tasks_ran_at = step
        # An adapter's wrapper has autocast in its own forward, which `generate` of the model inside does not call.
        with self.throughput.paused(), self.accelerator.autocast():
            try:
                results = evaluate_loaded(
                    base_model(self.model),
                    self.processing_class,
                    output=Path(self.args.output_dir) / "eval_tasks" / f"step-{step}",
                    batch_size=self.args.eval_tasks_batch_size,
                    max_new_tokens=MAX_NEW_TOKENS,
                    name=f"step-{step}",
                    **self._task_options,
                )
            except TasksFailed as error:
                logger.warning("step %d: %s", step, error)
                results = error.results
        scores = {SECONDS: round(time.perf_counter() - begin, 2)}
        for name, entry in results["tasks"].items():
            metric = entry["main_metric"]
            scores[f"eval_{name}_{metric}"] = entry["metrics"][metric]["value"]
        due = self.control.should_log
        self.log(scores)
        # Which a log clears: the training's own is still to come.
        self.control.should_log = due
        return scores

    @property
    def task_scores(self) -> dict[str, float]:
        """The latest scores by `eval_TASK_METRIC`; none where none was logged."""
        return next((scores for log in reversed(self.state.log_history) if (scores := logged_scores(log))), {})


def logged_scores(log: dict[str, float]) -> dict[str, float]:
    """The scores of a log of [`TaskEvaluation`]; none of another log.

    Args:
        log (`dict`): an entry of `trainer.state.log_history`.

    Returns:
        `dict[str, float]`: by `eval_TASK_METRIC`.
    """
    if SECONDS not in log:
        return {}
    return {name: score for name, score in log.items() if name.startswith("eval_") and name != SECONDS}
