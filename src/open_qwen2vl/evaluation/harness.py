"""lmms-eval's side of an evaluation: what a name of a task means, loading it, running it.

Each task runs alone, so that one that fails leaves the others be. Every rank of a data-parallel run builds all of a
task's requests, as if it were the only one; the model deals them out, and rank 0 alone scores: the result is that of
one process, and a judge is asked once.
"""

import argparse
import contextlib
import copy
import difflib
import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..output_lock import local_state
from ..places import Place, is_remote
from .benchmarks import BENCHMARKS, TASKS_FOLDER, Benchmark

RULES = ("standard", "paper")
# What lmms-eval's own command passes by default.
REASONING_TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'
JUDGE_KEYS = {"openai": "OPENAI_API_KEY", "azure": "AZURE_API_KEY"}
JUDGE_PATTERN = re.compile(r"llm_judge|API_KEY|API_TYPE|openai", re.IGNORECASE)


class Target(NamedTuple):
    """What runs for a name that the user gave."""

    name: str
    task: str  # lmms-eval's or our task
    main_metric: str | None  # the task's first where it is None
    percent: float | None  # what makes the task's metrics percentages; found from the samples where None
    rule: str  # how it is scored, one sentence
    benchmark: Benchmark | None  # where the name is one of the eight


def find_target(name: str, rules: str = "standard", judge: bool = False) -> Target:
    """Which task a name means."""
    if rules not in RULES:
        raise ValueError(f"--rules {rules}: it is one of {', '.join(RULES)}")
    benchmark = BENCHMARKS.get(name)
    if benchmark is None:
        if rules == "paper":
            raise ValueError(f"--rules paper: {name} is none of the paper's tasks ({', '.join(BENCHMARKS)})")
        return Target(name, name, None, None, "lmms-eval's own task and scoring.", None)
    if rules == "paper":
        return Target(name, benchmark.paper_task, benchmark.paper_metric, 100.0, benchmark.paper_rule, benchmark)
    if judge and benchmark.judge_task is not None:
        rule = "lmms-eval's own task: an LLM judge reads the answers."
        return Target(name, benchmark.judge_task, benchmark.judge_metric, 1.0, rule, benchmark)
    return Target(name, benchmark.task, benchmark.main_metric, benchmark.percent, benchmark.rule, benchmark)


def require_judge_key() -> None:
    """Refuse a judge that could not be asked."""
    api = os.environ.get("API_TYPE", "openai").lower()
    key = JUDGE_KEYS.get(api.removeprefix("async_"))
    if key is not None and not os.environ.get(key):
        raise ValueError(f"--judge: the environment variable {key} is not set (API_TYPE is {api})")


def import_harness() -> Any:
    """lmms-eval's evaluator, without its log messages."""
    try:
        from loguru import logger

        logger.disable("lmms_eval")
        from lmms_eval import evaluator
    except ImportError as error:
        raise ValueError('evaluate needs lmms-eval: pip install "open-qwen2vl[eval]"') from error
    return evaluator


def make_task_manager(tasks: Sequence[str], folders: Sequence[Path] = ()) -> Any:
    """An index of tasks that has the given ones; lmms-eval's own 2,000 files are read only if they are needed."""
    import_harness()
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"--include-path {folder}: no such folder")
    paths = [str(TASKS_FOLDER), *map(str, folders)]
    manager = _manager_class()("ERROR", include_path=paths, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = _manager_class()("ERROR", include_path=paths)
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ValueError(f"--tasks {name}: no such task" + (f"; near it: {', '.join(near)}" if near else ""))
    return manager


@functools.cache
def _manager_class() -> type:
    """lmms-eval's index of tasks, which reads its own files, for more than a second, once a process."""
    from lmms_eval.tasks import TaskManager

    own = functools.cache(lambda: TaskManager("ERROR", include_defaults=False).initialize_tasks())

    class Tasks(TaskManager):
        def initialize_tasks(self, include_path: Any = None, include_defaults: bool = True) -> dict[str, Any]:
            found = super().initialize_tasks(include_path, include_defaults=False)
            return {**found, **copy.deepcopy(own())} if include_defaults else found

    return Tasks


def load_tasks(manager: Any, name: str) -> list:
    """A task, or the tasks of a group, with their data.

    lmms-eval makes conversations of generation tasks only: those that score given answers come in its other form.
    """
    tasks = _leaves(manager.load_task_or_group([name], "chat"))
    if any(task.OUTPUT_TYPE in ("loglikelihood", "multiple_choice") for task in tasks):
        tasks = _leaves(manager.load_task_or_group([name], "simple"))
    for task in tasks:
        _check_target(task)
        if len(task.aggregation()) > 1:
            # Files for a benchmark's server; MMBench's ends the task on an answer that Excel cannot hold.
            task.aggregation().pop("submission", None)
    return tasks


def _check_target(task: Any) -> None:
    """lmms-eval takes a `doc_to_target` that is no column for the answer itself, and every sample would be wrong."""
    named, columns = task.config.doc_to_target, getattr(task, "features", [])
    # A template has braces; a number is a choice; functions that score may look elsewhere.
    if not isinstance(named, str) or "{" in named or named.isdigit() or callable(task.config.process_results):
        return
    if columns and named not in columns:
        raise ValueError(f"doc_to_target {named!r} is no column of the data, which has {', '.join(columns)}")


def _leaves(loaded: dict) -> list:
    return [
        task for value in loaded.values() for task in (_leaves(value) if isinstance(value, dict) else [value]) if task
    ]


def may_ask_judge(task: Any) -> bool:
    """Whether the code that scores a task mentions an LLM judge, also where another task of the same file asks it."""
    functions = [task.config.process_results, *getattr(task, "_aggregation_list", {}).values()]
    # lmms-eval's modules of functions are not in sys.modules.
    files = {Path(function.__code__.co_filename) for function in functions if hasattr(function, "__code__")}
    return any(JUDGE_PATTERN.search(source) for file in files for source in _sources(file))


def _sources(file: Path) -> Iterator[str]:
    """A file, and those beside it that it imports."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    yield text
    for name in re.findall(r"^\s*(?:from|import) [\w.]*?(\w+)(?: import|$| as )", text, re.MULTILINE):
        beside = file.with_name(f"{name}.py")
        if beside != file and beside.is_file():
            yield beside.read_text(encoding="utf-8")


def run_task(task: Any, model: Any, manager: Any, limit: int | None, output: Place | None) -> dict[str, Any]:
    """Let a model answer a task and score the answers."""
    evaluator = import_harness()
    options = argparse.Namespace(
        output_path=None if output is None else str(local_state(output) if is_remote(output) else output),
        process_with_media=False,
        reasoning_tags=REASONING_TAGS,
        agentic_trace_mode="basic",
    )
    with _as_one_process(), contextlib.redirect_stdout(sys.stderr):
        return evaluator.simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            cli_args=options,
            # In one thread: tasks that draw a random letter draw the same ones each time.
            process_docs_parallel=1,
        )


def root_cause(error: Exception) -> str:
    """The message of an error, taken out of the wrapping of retries."""
    attempt = getattr(error, "last_attempt", None)
    if attempt is not None and attempt.exception() is not None:
        return root_cause(attempt.exception())
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _as_one_process() -> Iterator[None]:
    """lmms-eval deals out documents by these two variables; here the model deals out requests."""
    names = {"RANK": "0", "WORLD_SIZE": "1"}
    saved = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
