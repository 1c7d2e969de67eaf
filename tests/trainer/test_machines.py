"""Machines that come and go, a launcher each: killed, resumed on another number of them, the same losses."""

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml

from open_qwen2vl.trainer import newest_complete_checkpoint
from tests.trainer.test_two_processes import ENVIRONMENT, RECIPE, plan

ROOT = RECIPE.parents[1]
STEPS = 40


def start_machines(count: int, log: Path, *arguments: str) -> list[psutil.Popen]:
    """A launcher of one process for each machine; all write to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(count), "--nproc_per_node", "1"]
    meeting = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    with log.open("a") as output:
        return [
            psutil.Popen(
                [*launcher, *meeting, "--node_rank", str(rank), str(RECIPE), *arguments],
                env=ENVIRONMENT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank in range(count)
        ]


def power_off(machines: list[psutil.Popen]) -> None:
    """SIGKILL to launchers, trainings and loader workers."""
    for machine in machines:
        everything = [*machine.children(recursive=True), machine] if machine.is_running() else []
        for process in everything:
            process.kill()
        psutil.wait_procs(everything)
        machine.wait()


def run_until(checkpoint: Path, machines: list[psutil.Popen], log: Path) -> int:
    """Power off once the checkpoint is there; the step of the newest one that is whole."""
    try:
        while not checkpoint.exists():
            assert all(machine.poll() is None for machine in machines), log.read_text()[-3000:]
            time.sleep(0.01)
    finally:
        power_off(machines)
    return int(newest_complete_checkpoint(checkpoint.parent).rpartition("-")[2])


def run_to_the_end(machines: list[psutil.Popen], log: Path) -> None:
    try:
        codes = [machine.wait(timeout=1200) for machine in machines]
    finally:
        power_off(machines)
    assert not any(codes), log.read_text()[-3000:]


def logs(output_dir: Path) -> list[dict]:
    state = json.loads((output_dir / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [log for log in state["log_history"] if "loss" in log]


@pytest.fixture
def config(backbones, tmp_path) -> Path:
    """A YAML for the recipe."""
    plan(tmp_path, "packs", 24, backbones["text"])
    options = {f"{part}_model": path for part, path in backbones.items()} | {
        "train_packs": str(tmp_path / "packs"),
        "max_steps": STEPS,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-6,  # with 1e-8 a gradient that is nothing but rounding moves its weight a whole step
        "dataloader_num_workers": 1,
        "use_cpu": True,
        "max_dropped_share": 0.2,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


@pytest.mark.slow
def test_two_machines_one_and_two_again(config, tmp_path):
    """Two packs a step throughout: of two machines one each, of one machine both."""
    log, run, quiet = (tmp_path / name for name in ("log", "run", "quiet"))
    here, alone = [str(config), "--output_dir", str(run)], ["--per_device_train_batch_size", "2"]

    first = run_until(run / "checkpoint-3", start_machines(2, log, *here), log)
    second = run_until(run / f"checkpoint-{first + 6}", start_machines(1, log, *here, *alone), log)
    assert first < second < STEPS
    run_to_the_end(start_machines(2, log, *here), log)
    for step in (first, second):
        assert f"checkpoint-{step}" in log.read_text()
    run_to_the_end(start_machines(1, log, str(config), "--output_dir", str(quiet), *alone), log)

    found, expected = logs(run), logs(quiet)
    assert [entry["step"] for entry in found] == list(range(1, STEPS + 1))
    assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in expected], rel=1e-5)
    for name in ("dropped_documents", "epoch"):  # of the same packs in each step
        assert [entry.get(name) for entry in found] == [entry.get(name) for entry in expected]
    results, others = (json.loads((folder / "train_results.json").read_text()) for folder in (run, quiet))
    assert (results["devices"], others["devices"]) == (2, 1)
    for name in ("steps", "tokens", "documents", "images", "flops", "sources", "dropped_documents"):
        assert results[name] == others[name]


@pytest.mark.slow
def test_a_launcher_that_is_told_to_stop_leaves_a_checkpoint(config, tmp_path):
    """It signals the whole group of the training; loader workers go on until the step is done."""
    log, run = tmp_path / "log", tmp_path / "run"
    (launcher,) = start_machines(1, log, str(config), "--output_dir", str(run), "--max_steps", "400")
    try:
        while not (run / "checkpoint-3").exists():
            assert launcher.poll() is None, log.read_text()[-3000:]
            time.sleep(0.01)
        launcher.terminate()
        launcher.wait(timeout=600)
    finally:
        power_off([launcher])
    assert "pretrain.py: stopped on request; the same command resumes" in log.read_text(), log.read_text()[-3000:]


def training_under(program: psutil.Popen) -> psutil.Process | None:
    """One of the trainings that a program has started through Ray, where one is there."""
    for process in program.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if command[1:3] == ["-u", str(RECIPE)]:
                return process
    return None


@pytest.mark.slow
def test_ray_starts_the_machines_and_starts_them_again(config, tmp_path):
    """A training is killed on one of two; with Ray's second start the losses are those of two launchers."""
    pytest.importorskip("ray", reason="ray is not installed")
    log, run, quiet = (tmp_path / name for name in ("log", "run", "quiet"))
    options = ["--machines", "2", "--gpus", "0", "--processes", "1", "--cpus", "1", "--max_failures", "1"]
    options += ["--accelerate_config", str(ROOT / "recipes" / "accelerate" / "two_cpu_processes.yaml")]
    command = [sys.executable, str(ROOT / "recipes" / "ray" / "train.py"), *options]
    # Ray's own settings and sockets, whose paths must be short.
    with tempfile.TemporaryDirectory() as home, log.open("w") as output:
        settings = {"HOME": home, "RAY_TMPDIR": home, "RAY_USAGE_STATS_ENABLED": "0"}
        program = psutil.Popen(
            [*command, str(RECIPE), str(config), "--output_dir", str(run)],
            env={**ENVIRONMENT, **settings},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while not (run / "checkpoint-3").exists():
                assert program.poll() is None, log.read_text()[-3000:]
                time.sleep(0.01)
            training_under(program).kill()
            assert program.wait(timeout=1200) == 0, log.read_text()[-3000:]
        finally:
            power_off([program])
    assert "the launcher ended with exit code 1" in log.read_text() and "INFO resuming from" in log.read_text()
    run_to_the_end(start_machines(2, log, str(config), "--output_dir", str(quiet)), log)
    assert [entry["loss"] for entry in logs(run)] == [entry["loss"] for entry in logs(quiet)]
