"""The step of the whole model in the trainer: packs at a time, lever by lever, loading at deep accumulation.

Each case is options of a recipe, so that what wins can be written into one.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader

from open_qwen2vl import PackingCollator
from open_qwen2vl.data import PackMixture, parse_sources

from . import right
from .models import Bench, measure, size_processor
from .prediction import predict
from .running import Record, Skip

Options = dict[str, Any]
Case = Callable[[Bench], dict]

GRADIENTS = "gradients with "
ACCUMULATION = 8
PACKS = {f"{packs} pack{'s' * (packs > 1)}": {"per_device_train_batch_size": packs} for packs in (1, 2, 4)}
# What 80 GB have room for.
PACKS["4 packs, every second layer recomputed"] = {
    "per_device_train_batch_size": 4,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"every_n_layers": 2},
}
BASE = "1 pack"
LEVERS: dict[str, Options] = {
    "bf16_residual": {"bf16_residual": True},
    "use_liger_kernel": {"use_liger_kernel": True},
    "use_liger_kernel, bf16_residual": {"use_liger_kernel": True, "bf16_residual": True},
    "torch_compile": {"torch_compile": True},
    "torch_compile, bf16_residual": {"torch_compile": True, "bf16_residual": True},
}
FP8: dict[str, Options] = {
    "float8, torch_compile": {"float8": True, "torch_compile": True},
    "float8, torch_compile, bf16_residual": {"float8": True, "torch_compile": True, "bf16_residual": True},
}
LOADING = {"loading beside computing, accumulation 16": 16, "loading beside computing, accumulation 128": 128}
ALONE_SECONDS = 8
TOGETHER = "fastest packs and lever"


def trains(case: str) -> bool:
    """Whether a case is a step of the whole model."""
    return case == TOGETHER or case in {**PACKS, **LEVERS, **FP8, **LOADING}


def options_of(case: str) -> Options:
    """What a case that trains trains with."""
    own = {} if case in LOADING else {**PACKS, **LEVERS, **FP8}[case]
    accumulation = LOADING.get(case, ACCUMULATION)
    return {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, **own}


def run(bench: Bench, options: Options, large: bool = False, measured: int = 2) -> dict:
    """Figures of a step with these options; what does not fit, or is not installed, is skipped by its reason."""
    if bench.gpu:
        needed, there = predict(bench, options).gib, torch.cuda.get_device_properties(0).total_memory / 2**30
        if needed > there:
            raise Skip(f"needs about {needed:.0f} GiB of {there:.0f}")
    if bench.tiny:
        options = {**options, "gradient_accumulation_steps": min(2, options["gradient_accumulation_steps"])}
    packs = bench.large_packs() if large else bench.small_packs()
    return measure(bench, options, packs, measured)


def lever(bench: Bench, case: str) -> dict:
    """A step with a lever."""
    return run(bench, {**options_of(case), **_on_a_cpu(bench, case)})


def numerics(bench: Bench, case: str) -> dict:
    """Whether a lever computes what it should."""
    return right.compare(bench, {**LEVERS, **FP8}[case] | _on_a_cpu(bench, case))


def _on_a_cpu(bench: Bench, case: str) -> Options:
    # There the compiler takes minutes; this backend traces as it does, and runs what it traced.
    return {"torch_compile_backend": "eager"} if bench.tiny and "torch_compile" in case else {}


def loader_alone(bench: Bench) -> dict:
    """Images a second that the workers bring, with nothing that computes."""
    data = PackMixture(parse_sources(str(bench.large_packs())), size_processor(bench.size))
    # Forever, as each epoch would start with empty queues.
    order = itertools.cycle(range(len(data)))
    loader = DataLoader(data, sampler=order, collate_fn=PackingCollator(), num_workers=bench.workers)
    batches, images = iter(loader), 0
    next(batches)
    start = time.perf_counter()
    while time.perf_counter() - start < (0.1 if bench.tiny else ALONE_SECONDS):
        images += next(batches)["packing_stats"]["images"]
    return {"images/s": images / (time.perf_counter() - start)}


def loading(bench: Bench, case: str) -> dict:
    """A step of so many micro-batches, of large photographs."""
    return run(bench, options_of(case), large=True, measured=1 if bench.tiny or LOADING[case] > 16 else 3)


def fastest(record: Record, groups: dict[str, Iterable[str]]) -> str | None:
    """Of the cases of these stages the one with the most tokens a second that is not known to be wrong."""
    measured = {
        case: record.of(stage, case)["done"]["tokens/s"]
        for stage, cases in groups.items()
        for case in cases
        if "done" in record.of(stage, case) and not is_wrong(record, case)
    }
    return max(measured, key=measured.get, default=None)


def is_wrong(record: Record, case: str) -> bool:
    """Whether a lever's gradients were found too far off; what was not looked at is not trusted either."""
    if case not in {**LEVERS, **FP8}:
        return False
    stage = "right" if case in LEVERS else "fp8"
    return not record.of(stage, GRADIENTS + case).get("done", {}).get("right", False)


def together(bench: Bench) -> dict:
    """The fastest number of packs and the fastest lever in one step."""
    record = Record.read(bench.record)
    packs, best = fastest(record, {"step": PACKS}), fastest(record, {"levers": LEVERS, "fp8": FP8})
    if best is None or packs in (None, BASE):
        raise Skip("the fastest is measured above")
    return {**run(bench, options := {**options_of(best), **PACKS[packs]}), "options": options}


def _cases(function: Callable[[Bench, str], dict], names: Iterable[str], prefix: str = "") -> dict[str, Case]:
    return {prefix + name: lambda bench, name=name: function(bench, name) for name in names}


STEP_CASES = _cases(lambda bench, case: run(bench, options_of(case)), PACKS)
LEVER_CASES = _cases(lever, LEVERS)
NUMERICS_CASES = _cases(numerics, LEVERS, GRADIENTS)
FP8_CASES = {**_cases(numerics, FP8, GRADIENTS), **_cases(lever, FP8)}
LOADER_CASES = {"workers alone": loader_alone, **_cases(loading, LOADING)}
TOGETHER_CASES = {TOGETHER: together}
