"""The GPU benchmark runs as a whole where there is no GPU: photographs, plan, loader, trainer, levers, table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/mfu.py"


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)


def test_tiny_run_prints_a_row_for_every_lever():
    done = run("--tiny", "--steps", "2")
    assert done.returncode == 0, done.stderr
    rows = [
        line.split("|") for line in done.stdout.splitlines() if line.startswith("| ") and "what differs" not in line
    ]
    assert [row[1].split()[0] for row in rows] == ["`packed_varlen`,", "activation"]
    for row in rows:
        assert float(row[2].replace(",", "")) > 0, "tokens/s"
        assert 0 <= float(row[5].strip(" %")) <= 100, "waiting for data"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_real_sizes_are_refused():
    done = run()
    assert done.returncode == 2 and "--tiny" in done.stderr
