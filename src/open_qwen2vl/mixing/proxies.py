"""A proxy: one run of the recipe on a mixture, and the held-out losses that it ends with.

    Proxy ─► DIR/0007/recipe.yaml ─ recipes/pretrain.py in this process ─► DIR/0007/train_results.json ─► DIR/0007.json

The record is the done-marker, and the run's folder goes when it is there. A proxy that was killed starts anew, or from
its newest checkpoint where the YAML file has `save_steps`.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..files import write_json, write_text

# The recipe needs all of it: imported here, once for all processes of a pool.
from ..trainer import PackedTrainingArguments  # noqa: F401


@dataclass(frozen=True)
class Proxy:
    """A training on a mixture.

    Attributes:
        record (`Path`): where its losses are written; the run lies beside it, in the folder of that name.
        recipe (`str`): file of the recipe.
        options (`dict`): of the recipe, but for those that follow from the others.
        weights (`dict[str, float]`): by source; one of 0 is left out.
        domains (`tuple[str, ...]`): names of `eval_packs`.
        seed (`int`): of the training.
        folder (`str`): from where the paths in `options` count.
    """

    record: Path
    recipe: str
    options: dict[str, Any]
    weights: dict[str, float]
    domains: tuple[str, ...]
    seed: int
    folder: str

    def __str__(self) -> str:
        return str(self.record)


def train_proxy(proxy: Proxy) -> dict[str, Any]:
    """Train and evaluate a proxy; its record, which is also written.

    A training that stops because of its loss has the record of a failure. What a user got wrong is a `ValueError`.
    """
    _take_a_gpu()
    run = proxy.record.with_suffix("")
    run.mkdir(parents=True, exist_ok=True)
    os.chdir(proxy.folder)  # on Ray, a worker's own
    write_text(run / "recipe.yaml", yaml.safe_dump(_recipe_options(proxy, run), sort_keys=False))
    code, last = _run_recipe(proxy.recipe, run / "recipe.yaml", run / "log.txt")
    if code not in (0, 1):
        raise (ValueError(f"proxy {run}: {last}") if code == 2 else SystemExit(code))
    found: dict[str, Any] = {"weights": proxy.weights, "seed": proxy.seed}
    found |= {"failed": last} if code else {"losses": _losses(run, proxy.domains)}
    write_json(proxy.record, found)
    shutil.rmtree(run)
    return found


def _recipe_options(proxy: Proxy, run: Path) -> dict[str, Any]:
    sources = [
        # A schedule that never changes: packs are laid out for the run, however long an epoch would be. Limits are
        # those of the training that is to come.
        {**{key: value for key, value in source.items() if key != "max_epochs"}, "weight": {0: weight}}
        for source, weight in zip(proxy.options["train_packs"], proxy.weights.values(), strict=True)
        if weight
    ]
    steps = proxy.options["max_steps"]
    return {
        "save_strategy": "steps" if "save_steps" in proxy.options else "no",
        "logging_steps": 10,
        **proxy.options,
        "train_packs": sources,
        "eval_strategy": "steps",
        "eval_steps": steps,
        "seed": proxy.seed,
        "output_dir": str(run),
        "disable_tqdm": True,
        "report_to": "none",
    }


def _run_recipe(recipe: str, config: Path, log: Path) -> tuple[int, str]:
    """Exit code and last line of a recipe, run as a program in this process, for it has imported all that is large."""
    argv, sys.argv = sys.argv, [recipe, str(config)]
    gc.freeze()  # or each collection of a trainer walks through the million objects of the imported libraries
    try:
        with open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            with contextlib.redirect_stderr(file):
                runpy.run_path(recipe, run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except Exception as error:
        raise ChildProcessError(f"proxy {config.parent}: {error!r}; its log is {log}") from error
    finally:
        sys.argv = argv
        gc.collect()  # of the run alone: its trainer is in cycles, and would stay, frozen, while the next ones train
        gc.unfreeze()
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return code, next((line.strip() for line in reversed(lines) if line.strip()), "")


def _losses(run: Path, domains: tuple[str, ...]) -> dict[str, float]:
    found = json.loads((run / "train_results.json").read_text(encoding="utf-8"))["eval_losses"]
    names = {domain: f"loss/{domain}" if len(domains) > 1 else "loss" for domain in domains}
    missing = [domain for domain, name in names.items() if name not in found]
    if missing:
        raise ValueError(f"proxy {run}: the domain {missing[0]!r} of eval_packs has no loss: nothing in it is learned")
    return {domain: found[name] for domain, name in names.items()}


def _take_a_gpu() -> None:
    """Let this process see one GPU of several, its own among the workers of a pool; Ray has done so."""
    if torch.cuda.is_initialized() or (count := torch.cuda.device_count()) < 2:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    number = multiprocessing.current_process()._identity
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[(number[0] - 1) % count if number else 0]
