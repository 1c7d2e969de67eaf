"""Evaluate a checkpoint or a model in memory: names become targets, a model becomes one of lmms-eval, all runs.

    names -> targets -> tasks with data -> requests -> answers -> scores -> samples/TASK.parquet, results.json

A task that fails leaves the others' results in place and ends the run with an error. Answers lie in OUTPUT/journal as
soon as they are there: the same command resumes after a kill.
"""

import contextlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin

from ..output_lock import only_writer
from ..places import Place, place
from .benchmarks import BENCHMARKS
from .few_shot import PAPER_SCORES, FewShot, few_shot_target
from .harness import Target, find_target, make_task_manager, require_judge_key
from .journal import Journal, journal_folder, model_fingerprint
from .runs import run_targets


def evaluate(
    model: str,
    tasks: Sequence[str] | None,
    output: str | os.PathLike,
    *,
    rules: str = "standard",
    batch_size: int = 8,
    limit: int | None = None,
    image_seq_length: int | None = None,
    max_new_tokens: int = 1024,
    judge: bool = False,
    device: str | None = None,
    include_path: Sequence[str | os.PathLike] = (),
    few_shot: FewShot | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint, alone or in each process of `accelerate launch`.

    Args:
        model (`str`): hub id or folder of a model with its processor, or the `output_dir` of a training.
        tasks (`Sequence[str]`, *optional*): benchmarks by the names of benchmarks.py, or any tasks or groups of
            lmms-eval; the eight benchmarks where None.
        output (`str` or `os.PathLike`): folder of the results; a rerun resumes a killed one.
        rules (`str`, *optional*, defaults to `"standard"`): `"paper"` for the original's prompts and scoring.
        batch_size (`int`, *optional*, defaults to 8): prompts that run at a time, in each process.
        limit (`int`, *optional*): only the first documents of each task.
        image_seq_length (`int`, *optional*): tokens per image; the processor's where not given.
        max_new_tokens (`int`, *optional*, defaults to 1024): longest answer where a task names none.
        judge (`bool`, *optional*, defaults to `False`): allow tasks that ask an LLM judge over a paid API.
        device (`str`, *optional*): as `"cuda:1"` or `"cpu"`; the process's own where not given.
        include_path (`Sequence`, *optional*): folders with YAML files of more tasks, whose Python code runs.
        few_shot ([`FewShot`], *optional*): prompt as a base model, with demonstrations; `tasks` are then those of the
            paper's Table 5 by default.

    Returns:
        `dict`: the content of `results.json`, the same in all processes.

    Raises:
        ValueError: for a user's mistake before anything runs; after the other tasks ran, naming those that failed.
    """
    targets, manager = find_tasks(tasks, rules, limit, judge, include_path, few_shot)

    from .generation import load_model

    # Without this accelerate takes processes on CPUs for strangers.
    state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())
    # Taken before the model is loaded: a folder that cannot be written is told at once.
    with only_writer(output, "evaluating to", rank=state.process_index, ranks=state.num_processes):
        loaded, processor = load_model(model, device)
        options = {"batch_size": batch_size, "limit": limit, "max_new_tokens": max_new_tokens, "judge": judge}
        options |= _model_options(loaded, processor, image_seq_length)
        _refuse_other_budget(place(output), options["image_seq_length"])
        lm = _make_lmms(loaded, processor, rules, few_shot, batch_size, image_seq_length, max_new_tokens)
        lm.fingerprint = model_fingerprint(loaded, processor)
        lm.journal = Journal(journal_folder(output), state.process_index)
        # No rank writes before all have read.
        state.wait_for_everyone()
        identity = _identity(model, loaded, lm.fingerprint)
        with contextlib.closing(lm.journal):
            return run_targets(lm, targets, place(output), manager, identity, options, rules=rules, few_shot=few_shot)


def evaluate_loaded(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    tasks: Sequence[str],
    output: str | os.PathLike | None = None,
    *,
    rules: str = "standard",
    batch_size: int = 8,
    limit: int | None = None,
    image_seq_length: int | None = None,
    max_new_tokens: int = 1024,
    include_path: Sequence[str | os.PathLike] = (),
    few_shot: FewShot | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Evaluate a model in memory; it and the random generators are left as they were.

    Args:
        model (`PreTrainedModel`): not wrapped; all processes of a data-parallel run call this with the same weights.
        processor (`ProcessorMixin`): its processor.
        tasks (`Sequence[str]`): as in [`evaluate`].
        output (`str` or `os.PathLike`, *optional*): folder of the results; nothing is written where not given.
        rules (`str`, *optional*, defaults to `"standard"`): as in [`evaluate`], like all that follow.
        batch_size (`int`, *optional*, defaults to 8): prompts that run at a time, in each process.
        limit (`int`, *optional*): only the first documents of each task.
        image_seq_length (`int`, *optional*): tokens per image.
        max_new_tokens (`int`, *optional*, defaults to 1024): longest answer where a task names none.
        include_path (`Sequence`, *optional*): folders with YAML files of more tasks.
        few_shot ([`FewShot`], *optional*): prompt as a base model, with demonstrations.
        name (`str`, *optional*): the model's name in the results; where it was loaded from if not given.

    Returns:
        `dict`: as [`evaluate`]; without fingerprint, and without a journal to resume from.

    Raises:
        ValueError: as [`evaluate`].
    """
    targets, manager = find_tasks(tasks, rules, limit, False, include_path, few_shot)
    lm = _make_lmms(model, processor, rules, few_shot, batch_size, image_seq_length, max_new_tokens)
    options = {"batch_size": batch_size, "limit": limit, "max_new_tokens": max_new_tokens, "judge": False}
    options |= _model_options(model, processor, image_seq_length)
    identity = _identity(model.name_or_path, model, None)
    identity["name"] = name or identity["name"]
    folder = None if output is None else place(output)
    with _left_as_it_was(model):
        return run_targets(lm, targets, folder, manager, identity, options, rules=rules, few_shot=few_shot)


def find_tasks(
    tasks: Sequence[str] | None,
    rules: str = "standard",
    limit: int | None = None,
    judge: bool = False,
    include_path: Sequence[str | os.PathLike] = (),
    few_shot: FewShot | None = None,
) -> tuple[list[Target], Any]:
    """Look tasks up by the arguments of [`evaluate`], without their data: what to run, and what knows it."""
    targets = _find_targets(tasks, rules, limit, judge, few_shot)
    return targets, make_task_manager([target.task for target in targets], [Path(folder) for folder in include_path])


def _find_targets(
    tasks: Sequence[str] | None, rules: str, limit: int | None, judge: bool, few_shot: FewShot | None
) -> list[Target]:
    default = BENCHMARKS if few_shot is None else PAPER_SCORES
    names = list(default) if tasks is None else list(dict.fromkeys(tasks))
    if not names:
        raise ValueError("--tasks: no task given")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    if judge:
        require_judge_key()
    if few_shot is None:
        return [find_target(name, rules, judge) for name in names]
    few_shot.check()
    if rules != "standard":
        raise ValueError("--shots has prompts and rules of its own: it does not go with --rules paper")
    return [few_shot_target(name) for name in names]


def _make_lmms(model, processor, rules, few_shot, batch_size, image_seq_length, max_new_tokens):
    from .generation import check_image_seq_length
    from .lmms_model import TransformersModel

    check_image_seq_length(model, processor, image_seq_length)
    return TransformersModel(
        model,
        processor,
        batch_size=batch_size,
        prompt_style="chat" if rules != "paper" and few_shot is None else "raw",
        image_seq_length=image_seq_length,
        max_new_tokens=max_new_tokens,
        share_requests=True,
        shot_separator="" if few_shot is None else few_shot.separator_of(processor),
    )


def _identity(path: str, model: PreTrainedModel, fingerprint: str | None) -> dict[str, Any]:
    revision = getattr(model.config, "_commit_hash", None)
    # A training's last checkpoint lies in its output_dir/model.
    name = Path(path).parent.name if Path(path).name == "model" else Path(path).name
    return {
        "name": path if revision else name or path,
        "path": path,
        "revision": revision,
        "fingerprint": fingerprint,
    }


def _model_options(model: PreTrainedModel, processor: ProcessorMixin, image_seq_length: int | None) -> dict[str, Any]:
    return {
        "image_seq_length": image_seq_length or getattr(processor, "image_seq_length", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def _refuse_other_budget(output: Place, budget: int | None) -> None:
    """Results with another number of tokens an image are others, and would be replaced."""
    path = output / "results.json"
    before = json.loads(path.read_text(encoding="utf-8"))["options"]["image_seq_length"] if path.exists() else budget
    if before != budget:
        raise ValueError(f"{output} has results of image_seq_length {before}, now {budget}: give another --output")


@contextlib.contextmanager
def _left_as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside; outside the mode and the random generators, which lmms-eval seeds, as before."""
    training, python, numbers = model.training, random.getstate(), np.random.get_state()
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        model.train(training)
