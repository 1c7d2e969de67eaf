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


def hear_ctrl_c() -> None:
    """Which the background jobs of a shell, these tests maybe, ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("way", "workers"), [("local", 2), ("query", 1)])
def test_ctrl_c_ends_a_command_and_its_workers(way, workers, tmp_path):
    command = [sys.executable, "-m", "tests.data.engine.interrupted", str(tmp_path), way]
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True, "preexec_fn": hear_ctrl_c}
    with subprocess.Popen(command, cwd=ROOT, **options) as process:
        while len(list(tmp_path.glob("*.pid"))) < workers:
            assert process.poll() is None
            time.sleep(0.02)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        os.killpg(process.pid, signal.SIGINT)
        try:
            error = process.communicate(timeout=120)[1]
        finally:
            process.kill()
    assert process.returncode == 130
    assert "interrupted" in error and "Traceback" not in error and "KeyboardInterrupt" not in error
    assert psutil.wait_procs(family, timeout=60)[1] == []
