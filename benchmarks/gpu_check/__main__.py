"""Ten minutes on a GPU that confirm or correct what was computed without one.

    make gpu-check
    PYTHONPATH=benchmarks python -m gpu_check [--size 2b] [--output benchmarks/results/gpu.md] [--stages step levers]
    PYTHONPATH=benchmarks python -m gpu_check --tiny

Random weights in the true sizes, photographs that packages ship, PackedTrainer itself. Each stage is a process of its
own with a budget of seconds; what it found is kept case by case in a json beside the output, and the same command goes
on from there. Without a GPU it writes the predictions for an H100 beside an empty column; `--tiny` runs every stage on
a CPU with a model of a few thousand parameters.
"""

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import attention, rates, right, steps, waits
from .models import SIZES, Bench
from .running import Record, Stage, run_cases, run_stage
from .table import write_report

STAGES = {
    "right": Stage("Attention and kernels, right or wrong", 90, {**right.CASES, **steps.NUMERICS_CASES}),
    "waits": Stage("Waits for the device", 30, waits.CASES),
    "step": Stage("The step, packs at a time", 75, steps.STEP_CASES),
    "levers": Stage("Levers, one by one", 130, steps.LEVER_CASES),
    "attention": Stage("Attention backends, one layer", 20, attention.CASES),
    "loader": Stage("Loading beside computing", 75, steps.LOADER_CASES),
    "fp8": Stage("fp8", 85, steps.FP8_CASES),
    "rates": Stage("What the card does, beside what is assumed", 20, rates.CASES),
    "together": Stage("What won, together", 40, steps.TOGETHER_CASES),
}
RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("transformers", "accelerate", "triton", "liger-kernel", "torchao")


def describe_machine(size: str) -> dict[str, str]:
    """Card and versions."""
    gpu = torch.cuda.is_available()
    facts = {
        "card": torch.cuda.get_device_name() if gpu else "CPU",
        "model": SIZES[size]["title"],
        "torch": torch.__version__,
        "CUDA": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if gpu else "none",
        "Python": platform.python_version(),
        "cores": str(os.cpu_count()),
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def run_in_processes(bench: Bench, names: list[str]) -> Record:
    """Every stage, each in a process; those that are done already are passed over."""
    record = Record.read(bench.record)
    record.begin(describe_machine(bench.size))
    command = [sys.executable, "-m", "gpu_check", "--size", bench.size, "--workers", str(bench.workers)]
    command += ["--output", str(bench.record.with_suffix(".md")), "--folder", str(bench.folder)]
    for name in names:
        stage = STAGES[name]
        print(f"{name}: {stage.title}, at most {stage.budget} s", flush=True)
        # A CPU is not what the budgets are for.
        budget = stage.budget if bench.gpu else 3600
        record = run_stage(bench.record, name, stage, [*command, "--one", name], bench.folder / f"{name}.log", budget)
        for case in stage.cases:
            outcome = record.of(name, case)
            print(f"  {case}: {outcome.get('failed') or outcome.get('skipped') or outcome['done']}", flush=True)
    return record


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Bench]:
    parser = argparse.ArgumentParser("gpu_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="2b", help="model (default: 2b)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU too")
    parser.add_argument("--output", type=Path, help="the table; a json lies beside it "
                        "(default: benchmarks/results/gpu.md, with --tiny FOLDER/gpu.md)")  # fmt: skip
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes that decode")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu-check"), help="for packs, logs and runs")
    parser.add_argument("--one", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.workers < 0:
        parser.error(f"--workers must be at least 0, got {args.workers}")
    if args.tiny:
        args.size, args.workers = "tiny", 0
    args.output = args.output or (args.folder if args.tiny else RESULTS) / "gpu.md"
    return args, Bench(args.size, args.folder, args.output.with_suffix(".json"), args.workers)


def main(arguments: list[str] | None = None) -> None:
    args, bench = parse(arguments)
    if args.one:
        return run_cases(Record.read(bench.record), args.one, STAGES[args.one], bench)
    # Of several cards the first: Trainer would spread a process over all of them.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    bench.folder.mkdir(parents=True, exist_ok=True)
    try:
        if bench.gpu or bench.tiny:
            record = run_in_processes(bench, args.stages)
        else:
            print("no GPU here: predictions only (--tiny runs every stage on a CPU)")
            record = Record(bench.record)
    except ValueError as error:
        sys.exit(f"error: {error}")
    write_report(args.output, record, STAGES, bench)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
