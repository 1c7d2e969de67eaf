"""The GPU benchmark runs as a whole where there is no GPU: photographs, plan, loader, trainer, a lever, the table."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/mfu.py"


@pytest.mark.slow
def test_tiny_run_prints_the_trainers_figures_of_a_lever():
    command = [sys.executable, SCRIPT, "--tiny", "--steps", "2", "--levers", "checkpoint2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| activation checkpointing")]
    assert float(row[2].replace(",", "")) > 0, "tokens/s"
    assert 0 <= float(row[5].strip(" %")) <= 100, "waiting for data"
