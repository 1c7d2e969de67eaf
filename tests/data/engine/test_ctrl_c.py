"""Ctrl-C, which a terminal sends to a command and all of its processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("way", "workers"), [("local", 2), ("query", 1)])
def test_ctrl_c_ends_a_command_and_its_workers(way, workers, tmp_path):
    command = [sys.executable, "-m", "tests.data.engine.interrupted", str(tmp_path), way]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while len(list(tmp_path.glob("*.pid"))) < workers:
            assert process.poll() is None
            time.sleep(0.02)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert "Traceback" not in error and "KeyboardInterrupt" not in error
    assert psutil.wait_procs(family, timeout=60)[1] == []
