import functools
import logging
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from open_qwen2vl.data.engine.engine import Outcome, ShardTask, run_tasks
from open_qwen2vl.data.resharding.options import ReshardOptions
from open_qwen2vl.data.resharding.resharding import reshard
from open_qwen2vl.data.storage.uids import UID_DTYPE, write_uids
from open_qwen2vl.files import renamed_when_whole
from tests.data.killed_step import assert_same_files, read_folder

PROCESS = "the worker's process"


class Upper:
    """A worker: upper case of a text; line by line a sample, those that are `bad` left out."""

    def __init__(self, suffix=""):
        if suffix == "refuse":
            raise ValueError("--suffix refuse: no such suffix")
        self._suffix, self._made_in = suffix, os.getpid()

    def __call__(self, task):
        assert self._made_in == os.getpid()
        lines = task.source.read_text().splitlines()
        if "kill" in lines:
            os.kill(os.getpid(), signal.SIGKILL)
        if "raise" in lines:
            raise ValueError(f"{task.source}: cannot be read")
        with renamed_when_whole(task.output) as temporary:
            suffix = f" by {os.getpid()}" if self._suffix == PROCESS else self._suffix
            temporary.write_text("\n".join(lines).upper() + suffix)
        return Outcome.of(len(lines), [(task.source.name, str(i), "bad") for i, x in enumerate(lines) if x == "bad"])


@pytest.fixture
def tasks(tmp_path):
    (tmp_path / "out").mkdir()
    made = [ShardTask(tmp_path / f"{n}.txt", tmp_path / f"out/{n}.txt") for n in range(6)]
    for number, task in enumerate(made):
        task.source.write_text("\n".join(["good"] * (number + 1) + ["bad"] * 2))
    return made


def run(tasks, make_worker=Upper, **options):
    return run_tasks(tasks, make_worker, description="testing", **{"num_workers": 1, **options})


def test_what_is_missing_is_done(tasks, caplog, capsys):
    tasks[2].output.write_text("done before")
    (tasks[0].output.parent / "0.txt.4711.tmp").write_text("half")
    (tasks[0].output.parent / "2.txt.4711.tmp").write_text("of another")
    with caplog.at_level(logging.WARNING):
        report = run(tasks, functools.partial(Upper, "!"))
    assert tasks[2].output.read_text() == "done before" and tasks[1].output.read_text() == "GOOD\nGOOD\nBAD\nBAD!"
    assert sorted(os.listdir(tasks[0].output.parent)) == [*(f"{n}.txt" for n in range(3)), "2.txt.4711.tmp"] + [
        f"{n}.txt" for n in range(3, 6)
    ]
    assert (report.samples, report.skipped, report.shards, report.done_before) == (28, {"bad": 10}, 5, 1)
    assert str(report) == "shards     5 (1 done before)\nsamples    28\nskipped    10 (bad 10)"
    assert caplog.text.count("bad") == 3  # the first ones, of five tars
    assert "testing: 100%" in (bar := capsys.readouterr().err) and "bad=10" in bar
    assert run(tasks).shards == 0


def test_processes_do_the_same(tasks):
    assert run(tasks, num_workers=2) == run([ShardTask(t.source, Path(f"{t.output}.2")) for t in tasks])
    assert all(task.output.read_bytes() == Path(f"{task.output}.2").read_bytes() for task in tasks)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_a_worker_raises_is_raised(tasks, num_workers):
    with pytest.raises(ValueError, match="--suffix refuse"):
        run(tasks, functools.partial(Upper, "refuse"), num_workers=num_workers)
    tasks[3].source.write_text("raise")
    with pytest.raises(ValueError, match="3.txt: cannot be read"):
        run(tasks, num_workers=num_workers)
    assert not tasks[3].output.exists()


def test_a_killed_worker_is_one_clear_error(tasks):
    tasks[1].source.write_text("kill")
    told = f"a worker process was killed by SIGKILL at {re.escape(str(tasks[1].output))}, perhaps for want of memory"
    with pytest.raises(ChildProcessError, match=told):
        run(tasks, num_workers=2)


def test_ranks_share_the_tasks(tasks, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    reports = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        # The others' results appear at any time and must not change what is whose.
        reports.append(run(tasks))
        assert ("testing" in capsys.readouterr().err) == (rank == 0)
    assert [report.shards for report in reports] == [2, 2, 1, 1]
    assert [report.done_before for report in reports] == [0] * 4
    assert all(task.output.exists() for task in tasks)


def test_wrong_options(tasks):
    with pytest.raises(ValueError, match="engine must be one of local, ray, got slurm"):
        run(tasks, engine="slurm")
    with pytest.raises(ValueError, match="num_workers must be at least 1, got 0"):
        run(tasks, num_workers=0)
    with pytest.raises(FileNotFoundError):
        run([ShardTask(Path("nowhere"), tasks[0].output)])


@pytest.fixture(scope="module")
def ray_cluster():
    """A real Ray of two cores on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


def test_two_workers_of_ray(ray_cluster, tasks):
    """Outputs as here, from two other processes; and an error that says the same. Each actor imports everything."""
    with pytest.raises(ValueError, match="2 cores and 0 GPUs: too little for a worker of 1 core and 0.5 GPUs"):
        run(tasks, engine="ray", num_workers=None, num_gpus=0.5)
    worker = functools.partial(Upper, PROCESS)
    assert run(tasks[:4], worker, engine="ray", num_workers=2).shards == 4
    tasks[5].source.write_text("raise")
    with pytest.raises(ValueError, match="^/.*5.txt: cannot be read$"):
        run(tasks[5:], worker, engine="ray", num_workers=1)
    texts = [task.output.read_text().rpartition(" by ") for task in tasks[:4]]
    assert [text for text, _, _ in texts] == [task.source.read_text().upper() for task in tasks[:4]]
    assert len({process for _, _, process in texts} - {str(os.getpid())}) == 2
    assert ray_cluster.is_initialized()  # whoever started it ends it


@pytest.mark.slow
def test_an_actor_that_dies_is_one_clear_error(ray_cluster, tasks):
    tasks[1].source.write_text("kill")
    with pytest.raises(ChildProcessError, match=f"a Ray actor died 4 times at {re.escape(str(tasks[1].output))}: "):
        run(tasks, engine="ray", num_workers=1)


@pytest.mark.slow
def test_a_step_on_ray(ray_cluster, tasks, make_tar, sample, tmp_path):
    local = run([ShardTask(task.source, Path(f"{task.output}.2")) for task in tasks])
    assert run(tasks, engine="ray", num_workers=None) == local
    tars = [make_tar(tmp_path / f"{n}.tar", sample(str(n), uid=f"{n:032x}")) for n in range(4)]
    write_uids(tmp_path / "subset.npy", np.array([(0, n) for n in range(3)], UID_DTYPE))
    for engine in ("local", "ray"):
        options = {"samples_per_shard": 2, "num_workers": 1 if engine == "local" else 2, "engine": engine}
        reshard(ReshardOptions(tars, tmp_path / "subset.npy", tmp_path / engine, **options))
    assert_same_files(read_folder(tmp_path / "ray"), read_folder(tmp_path / "local"))
