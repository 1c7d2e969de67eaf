import os
import signal
import subprocess
import sys
import time

import pytest

from open_qwen2vl.trainer.checkpoints import interruption
from open_qwen2vl.trainer.checkpoints.interruption import StopRequest, only_run_in

LOAD = "import sys, time\nfrom open_qwen2vl.trainer.checkpoints import interruption\nmodule = vars(interruption)\n"
HOLD = """
with module["only_run_in"](sys.argv[1], True):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", LOAD + HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_two_runs_in_one_folder_are_refused(holder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(interruption, "LOCK_SECONDS", 0.3)
    with pytest.raises(ValueError, match=f"process {holder.pid} is training in"), only_run_in(tmp_path, True):
        pass
    assert f"waiting for process {holder.pid}" in caplog.text
    with only_run_in(tmp_path, False):
        pass  # a rank that writes nothing asks for nothing


def test_a_killed_run_frees_the_folder_for_the_one_that_waits(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    start = time.monotonic()
    with only_run_in(tmp_path, True):
        assert time.monotonic() - start < 10
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_the_death_of_the_launcher_is_a_request(tmp_path):
    """A process whose parent is killed notices it, if a launcher started it."""
    child = (
        f"{LOAD}request = module['StopRequest']()\n"
        "with request.listening():\n"
        f"    open({str(tmp_path / 'ready')!r}, 'w').close()\n"
        "    while not request.requested: time.sleep(0.05)\n"
        f"    open({str(tmp_path / 'left')!r}, 'w').close()\n"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = {**os.environ, "LOCAL_RANK": "0"}
    process = subprocess.Popen([sys.executable, "-c", parent], env=environment)
    wait_for(tmp_path / "ready")
    process.kill()
    process.wait()
    wait_for(tmp_path / "left")


def wait_for(path, seconds=60):
    give_up = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < give_up, f"{path.name} never came"
        time.sleep(0.05)


def test_sigterm_is_a_request_only_while_listening():
    request = StopRequest()
    before = signal.getsignal(signal.SIGTERM)
    with request.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.requested
    assert signal.getsignal(signal.SIGTERM) is before
