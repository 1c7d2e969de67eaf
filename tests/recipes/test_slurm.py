"""The Slurm script under a real Slurm of this machine, whose two nodes are two daemons on 127.0.0.1."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from open_qwen2vl import cli
from tests.recipes.test_accelerate_configs import ENVIRONMENT, RECIPES, SBATCH
from tests.tars import write_caption_tar

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue", "srun")
STEPS = 60

# No key between the daemons, no limits by cgroups, one GPU a node that is none.
SETTINGS = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
KillWait=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=127.0.0.1 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=1 Gres=gpu:1
NodeName=127.0.0.2 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=1 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A cluster of two nodes; its folder, and SLURM_CONF for who asks it."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs {', '.join(missing) or 'root'} (Debian's package slurm-wlm, started by root)")
    folder = tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in free:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in free]
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(SETTINGS.format(folder=folder, host=host, ports=ports))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    daemons = []
    try:
        for daemon in (["slurmctld", "-c"], ["slurmd", "-N", "127.0.0.1"], ["slurmd", "-N", "127.0.0.2"]):
            with (folder / "log").open("a") as log:
                daemons.append(subprocess.Popen([*daemon, "-D"], stdout=log, stderr=log))
        yield folder
    finally:
        subprocess.run(["scancel", "--user", "root"], timeout=60)
        for _ in range(200):  # what is left of a failed test
            if not subprocess.run(["squeue", "--noheader"], capture_output=True, timeout=60).stdout:
                break
            time.sleep(0.1)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=60)


def ask(*words: str) -> str:
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=60).stdout


def state_of(job: str) -> str:
    return ask("show", "job", job).partition("JobState=")[2].partition(" ")[0]


@pytest.mark.slow
def test_a_job_is_signalled_requeued_and_completes(slurm, backbones, tmp_path):
    """SIGTERM as before a time limit: the training saves, the job waits in the queue, resumes and ends."""
    write_caption_tar(tmp_path / "0.tar", ["a cat", "two dogs run", "blue and green"] * 8)
    packs = ["--output", str(tmp_path / "packs"), "--image-seq-length", "4", "--max-length", "64"]
    assert cli.main(["pack", str(tmp_path / "0.tar"), "--tokenizer", backbones["text"], *packs]) == 0
    options = {f"{part}_model": path for part, path in backbones.items()} | {
        "train_packs": str(tmp_path / "packs"),
        "output_dir": str(tmp_path / "run"),
        "max_steps": STEPS,
        "save_steps": 5,
        "logging_steps": 1,
        "dataloader_num_workers": 1,
        "use_cpu": True,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    log = tmp_path / "job.log"
    machine = ["--nodes", "2", "--gpus-per-node", "1", "--cpus-per-task", "1", "--output", str(log)]
    config = {"ACCELERATE_CONFIG": "recipes/accelerate/two_cpu_processes.yaml", "SLURM_CONF": os.environ["SLURM_CONF"]}
    command = ["sbatch", "--parsable", *machine, str(SBATCH), "recipes/pretrain.py", str(tmp_path / "config.yaml")]
    submitted = subprocess.run(
        command, env={**ENVIRONMENT, **config}, cwd=RECIPES.parent, capture_output=True, text=True, timeout=60
    )
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()

    def wait_for(condition) -> None:
        end = time.monotonic() + 1200
        while not condition():
            told = log.read_text()[-3000:] if log.exists() else (slurm / "log").read_text()[-3000:]
            assert state_of(job) not in ("FAILED", "CANCELLED", "NODE_FAIL") and time.monotonic() < end, told
            time.sleep(0.05)

    wait_for((tmp_path / "run" / "checkpoint-5").exists)
    subprocess.run(["scancel", "--signal", "TERM", "--batch", job], check=True, timeout=60)
    wait_for(lambda: state_of(job) == "COMPLETED")
    assert "Restarts=1" in ask("show", "job", job)
    told = log.read_text()
    assert "pretrain.py: stopped on request; the same command resumes" in told and "INFO resuming from" in told
    state = json.loads((tmp_path / "run" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, STEPS + 1))
    assert json.loads((tmp_path / "run" / "train_results.json").read_text())["devices"] == 2
