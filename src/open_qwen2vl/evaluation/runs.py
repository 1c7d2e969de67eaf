"""Running tasks: load them all, let the model answer each, score on rank 0, write what is there after each.

A task that fails leaves the others be; every rank learns of it, so that none waits.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..files import remove_temporaries
from ..places import Place
from .few_shot import FewShot, Run, entry_over_seeds, few_shot_runs
from .harness import Target, load_tasks, may_ask_judge, root_cause, run_task
from .results import FILES, FORMAT_VERSION, TaskResult, add_interval, versions, write_results, write_samples

if TYPE_CHECKING:
    from lmms_eval.api.model import lmms

logger = logging.getLogger(__name__)


class TasksFailed(ValueError):
    """Some tasks failed, and the others ran."""

    def __init__(self, message: str, results: dict[str, Any]):
        super().__init__(message)
        self.results = results


def run_targets(
    model: "lmms",
    targets: Sequence[Target],
    output: Place | None,
    manager: Any,
    identity: dict[str, Any],
    options: dict[str, Any],
    *,
    rules: str = "standard",
    few_shot: FewShot | None = None,
) -> dict[str, Any]:
    """Run targets with any model of lmms-eval, write the results, and at the end name those that failed."""
    begin = time.perf_counter()
    if output is not None and PartialState().is_main_process:
        folder = output / "samples"
        # What a killed run left half-written.
        remove_temporaries(
            [
                *(output / name for name in FILES),
                *(folder / path.name.rsplit(".", 2)[0] for path in folder.glob("*.tmp")),
            ]
        )
    loaded, failed = _load_all(targets, manager, bool(options.get("judge")))
    unloaded = len(failed)
    runs = _runs(loaded, few_shot, model)
    results = {"format_version": FORMAT_VERSION, "model": identity, **versions(), "rules": rules}
    results |= {"shots": 0 if few_shot is None else list(few_shot.shots), "options": options}
    results |= {"seconds": 0.0, "tasks": {}}
    for run in runs:
        outcome = _run_on_all(run, model, manager, options.get("limit"), output)
        if isinstance(outcome, str):
            failed[run.target.name] = outcome
            continue
        results["tasks"][run.target.name] = outcome
        results["seconds"] = round(time.perf_counter() - begin, 2)
        if output is not None and PartialState().is_main_process:
            write_results(results, [run.target for run in runs], output)
    if failed:
        where = f"; the results of the others are in {output}" if results["tasks"] and output is not None else ""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise TasksFailed(f"{len(failed)} of {len(runs) + unloaded} tasks failed: {reasons}{where}", results)
    return results


def _load_all(targets: Sequence[Target], manager: Any, judge: bool) -> tuple[list[tuple[Target, Any]], dict[str, str]]:
    """All tasks with their data, and what failed; rank 0 first, which fills the cache for the others."""
    loaded, failed = [], {}
    for target in targets:
        tasks, reason = [], None
        with PartialState().main_process_first():
            try:
                tasks = load_tasks(manager, target.task)
            except Exception as error:
                reason = root_cause(error)
        reason = next(filter(None, gather_object([reason])), None)
        if reason is not None:
            failed[target.name] = reason
            continue
        for task in tasks:
            if not judge and target.benchmark is None and may_ask_judge(task):
                raise ValueError(f"--tasks {target.name}: {task.config.task} may ask a paid judge; --judge allows it")
            loaded.append((target if len(tasks) == 1 else target._replace(name=task.config.task), task))
    return loaded, failed


def _runs(loaded: list[tuple[Target, Any]], few_shot: FewShot | None, model: "lmms") -> list[Run]:
    if few_shot is None:
        return [Run(target, task, [None]) for target, task in loaded]
    runs, error = [], None
    with PartialState().main_process_first():
        try:
            runs = few_shot_runs(loaded, few_shot, model.model, model.processor)
        except Exception as exception:
            error = exception
    if error is not None:
        raise error
    return runs


def _run_on_all(
    run: Run, model: "lmms", manager: Any, limit: int | None, output: Place | None
) -> dict[str, Any] | str:
    """A run's entry, or why it failed: the same on all ranks."""
    results: list[TaskResult] = []
    entries = []
    for make_messages in run.messages:
        model.make_messages = make_messages
        entries.append(_on_all(run, lambda: _answer(run, model, manager, limit, output, results)))
        if isinstance(entries[-1], str):
            return entries[-1]
    if output is not None:
        path = output / "samples" / f"{run.target.name}.parquet"
        failure = _on_all(run, lambda: write_samples(results, path) if results else None)
        if failure is not None:
            return failure
    entry = entries[0] if run.shots is None else entry_over_seeds(entries, run.shots, run.seeds)
    return _on_all(run, lambda: add_interval(entry, results) or entry)


def _on_all(run: Run, function: Callable[[], Any]) -> Any:
    """What a function gave on rank 0, or why it failed there."""
    try:
        outcome = [function()]
    except Exception as error:
        logger.debug("%s failed", run.target.name, exc_info=True)
        outcome = [root_cause(error)]
    if PartialState().num_processes > 1:
        broadcast_object_list(outcome)
    return outcome[0]


def _answer(
    run: Run, model: "lmms", manager: Any, limit: int | None, output: Place | None, results: list[TaskResult]
) -> dict[str, Any] | None:
    """Answer the task once; on rank 0 score it too, add to the results and return its entry."""
    from .lmms_model import ScoredElsewhere

    begin = time.perf_counter()
    try:
        raw = run_task(run.task, model, manager, limit, output)
    except ScoredElsewhere:
        return None
    results.append(TaskResult(run.target, run.task, raw, getattr(model, "prompts", {})))
    return results[-1].entry(time.perf_counter() - begin)
