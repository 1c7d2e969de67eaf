"""Real FSDP2 on two gloo processes: it changes classes too, and a rank without images must meet every collective."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.qwen_vl import FAMILIES, make_tokenizer

SCRIPT = Path(__file__).with_name("fsdp2_step.py")


@pytest.mark.slow
def test_sharded_gradients_are_those_of_one_process(tmp_path):
    make_tokenizer(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert sum(done.stdout.count(f"{family} ") for family in FAMILIES) == 6
