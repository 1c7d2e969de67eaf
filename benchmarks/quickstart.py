"""The quickstart as users run it, over seeds: both halves' figures with their spread, and CPU minutes.

    python benchmarks/quickstart.py [--seeds 0 1 2] [--folder runs/quickstart-seeds] [--validation]

Each seed is a whole `recipes/quickstart/run.sh` in a folder of its own, with random weights and an order of its own on
the same pictures. The same command again goes on where it was stopped; what was spent before is counted too, but for
the step that was killed. `--validation` asks about the pictures on which options are chosen. On a processor with more,
`ATEN_CPU_CAPABILITY=avx2` shows what an older one would do. Writes benchmarks/results/quickstart.md, in whose name
`_validation` and `_avx2` tell of either.
"""

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from report import describe_machine, write_result

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
KINDS = ("color", "shape", "yes_no_color", "yes_no_shape")


def run(folder: Path, seed: int, validation: bool) -> dict[str, float]:
    """The figures of one seed, and the CPU minutes of all its processes; an error if a step fails."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "recipes").exists():
        (folder / "recipes").symlink_to(RECIPES)
    spent = folder / "cpu_seconds.json"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    variables = {"SEED": str(seed)} | ({"VALIDATION": "1"} if validation else {})
    done = subprocess.run(["sh", "recipes/quickstart/run.sh"], cwd=folder, env=os.environ | variables)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds += json.loads(spent.read_text()) if spent.exists() else 0
    spent.write_text(json.dumps(seconds))
    done.check_returncode()
    captions = json.loads((folder / "runs/quickstart/metrics.json").read_text())
    answers = json.loads((folder / "runs/quickstart/sft/metrics.json").read_text())
    figures = {"emoji": captions["held_out_exact_match"], "easy-VQA": answers["accuracy"]}
    return figures | {kind: answers["by_type"][kind] for kind in KINDS} | {"CPU min": seconds / 60}


def table(runs: dict[int, dict[str, float]]) -> list[str]:
    """A row for each seed, and below them the means with their standard deviations."""
    names = list(next(iter(runs.values())))
    digits = {name: 1 if name == "CPU min" else 3 for name in names}
    rows = ["| seed | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for seed, figures in runs.items():
        rows.append(f"| {seed} | " + " | ".join(f"{figures[name]:.{digits[name]}f}" for name in names) + " |")
    if len(runs) > 1:
        cells = []
        for name in names:
            values = [figures[name] for figures in runs.values()]
            mean, spread = statistics.mean(values), statistics.stdev(values)
            cells.append(f"{mean:.{digits[name]}f} ± {spread:.{digits[name]}f}")
        rows.append("| mean | " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart-seeds"))
    parser.add_argument("--validation", action="store_true", help="ask about the pictures on which options are chosen")
    args = parser.parse_args()
    runs = {seed: run(args.folder / f"seed-{seed}", seed, args.validation) for seed in args.seeds}
    machine = describe_machine(shlex.join(["python", "benchmarks/quickstart.py", *sys.argv[1:]]))
    name = "quickstart_validation" if args.validation else "quickstart"
    if limit := os.environ.get("ATEN_CPU_CAPABILITY"):
        machine[-1] += f"; ATEN_CPU_CAPABILITY={limit}"
        name += f"_{limit}"
    write_result(name, table(runs), machine)


if __name__ == "__main__":
    main()
