"""Evaluations that are killed and go on, and two processes against one."""

import json
import os
import random
import signal
import socket
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from lmms_eval import evaluator  # noqa: F401 - here, so that no fork imports it

from open_qwen2vl.evaluation import evaluate, lmms_model  # noqa: F401
from open_qwen2vl.output_lock import only_writer
from tests.evaluation.easyvqa import write_tasks
from tests.fork_server import fork_program

TASKS = ("easyvqa_gen", "easyvqa_mc")
SAMPLES = 32


class Evaluations:
    """Evaluations of one model, each rank a fork of this process."""

    def __init__(self, folder: Path, model: Path, tasks: Path):
        self.folder, self.model = folder, model
        self.options = ["--tasks", ",".join(TASKS), "--trust-task-code", "--include-path", tasks, "--batch-size", "4"]
        self.children: list[int] = []

    def start(self, output: str, ranks: int = 1, file_limit: int = 0) -> list[int]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        for rank in range(ranks):
            environment = {}
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self.fork(output, self.folder / f"{output}-{rank}.log", environment, file_limit if rank == 1 else 0)
        return self.children

    def fork(self, output: str, log: Path, environment: dict[str, str], file_limit: int = 0) -> None:
        environment = {**environment, "LMMS_EVAL_DATASETS_CACHE": str(self.folder / "datasets")}
        command = ["open-qwen2vl", "evaluate", self.model, "--output", self.folder / output, *self.options]
        self.children.append(fork_program(*command, log=log, environment=environment, file_limit=file_limit))

    def wait(self) -> list[int]:
        """Exit codes of all that were started, as wait statuses."""
        statuses = [os.waitpid(child, 0)[1] for child in self.children]
        self.children = []
        return statuses

    def run(self, output: str, ranks: int = 1) -> None:
        self.start(output, ranks)
        assert self.wait() == [0] * ranks, (self.folder / f"{output}-0.log").read_text()


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("runs")
    tasks = write_tasks(folder / "tasks", SAMPLES)
    evaluations = Evaluations(folder, model_folder, tasks)
    evaluations.run("whole")
    return evaluations


def journal_keys(folder: Path) -> list[str]:
    keys = []
    for path in sorted((folder / "journal").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            if line.endswith("}"):
                keys.append(json.loads(line)["key"])
    return keys


def without_seconds(results: dict) -> dict:
    tasks = {name: {**entry, "seconds": 0} for name, entry in results["tasks"].items()}
    return {**results, "seconds": 0, "tasks": tasks}


def assert_same_results(folder: Path, whole: Path) -> None:
    for task in TASKS:
        name = f"samples/{task}.parquet"
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    got, expected = (json.loads((one / "results.json").read_text()) for one in (folder, whole))
    assert without_seconds(got) == without_seconds(expected)
    assert (folder / "table.md").read_bytes() == (whole / "table.md").read_bytes()
    assert not list(folder.rglob("*.tmp"))


def test_samples_differ_from_each_other(evaluations):
    """Else the comparisons below would show little."""
    table = pq.read_table(evaluations.folder / "whole" / "samples" / "easyvqa_gen.parquet")
    assert table.num_rows == SAMPLES
    assert len(set(table["response"].to_pylist())) > SAMPLES / 3
    assert table["images"].to_pylist()[0][0]["bytes"].startswith(b"\xff\xd8")


def test_a_killed_evaluation_goes_on(evaluations):
    folder = evaluations.folder / "killed"
    rng = random.Random(0)
    answers = SAMPLES * (1 + 13)
    for share in sorted(rng.uniform(0.02, 0.95) for _ in range(2)):
        child = evaluations.start("killed")[0]
        deadline = time.monotonic() + 60
        while len(journal_keys(folder)) < share * answers and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        assert evaluations.wait() == [signal.SIGKILL], "it ended before it was killed"
        known = len(journal_keys(folder))
        assert share * answers <= known < answers
        journal = folder / "journal" / "rank-0.jsonl"
        # As if the kill had come in the middle of a write.
        os.truncate(journal, journal.stat().st_size - 7)
    evaluations.run("killed")
    assert_same_results(folder, evaluations.folder / "whole")
    keys = journal_keys(folder)
    # The line that was cut off, and the other answers of its question.
    assert len(set(keys)) == answers and len(keys) <= answers + 2 * 12, "answers were computed again"


def test_two_evaluations_to_one_folder_do_not_mix(evaluations):
    """The folder is held here, not by a first evaluation: on a busy machine that may have ended before the second."""
    output, log = evaluations.folder / "shared", evaluations.folder / "shared.log"
    with only_writer(output, "evaluating to"):
        evaluations.fork("shared", log, {})
        assert evaluations.wait() == [2 << 8]
    assert (
        f"process {os.getpid()} is evaluating to {output}: wait for it or stop it" in log.read_text().splitlines()[-1]
    )
    evaluations.run("shared")
    assert_same_results(output, evaluations.folder / "whole")


def test_two_processes_give_what_one_gives(evaluations):
    evaluations.run("two", ranks=2)
    assert_same_results(evaluations.folder / "two", evaluations.folder / "whole")
    lines = [len(path.read_text().splitlines()) for path in (evaluations.folder / "two/journal").iterdir()]
    assert len(lines) == 2 and min(lines) > 0.4 * sum(lines)


def test_a_rank_that_fails_ends_its_task_on_all(evaluations):
    """Rank 1's disk is full after the first task: no rank waits for it, and the first task's results are kept."""
    evaluations.start("failing", ranks=2, file_limit=20_000)
    assert evaluations.wait() == [2 << 8, 2 << 8]
    log = (evaluations.folder / "failing-0.log").read_text()
    assert "1 of 2 tasks failed: easyvqa_mc: RuntimeError: rank 1: OSError: [Errno 27] File too large" in log
    results, whole = (
        json.loads((evaluations.folder / name / "results.json").read_text())["tasks"] for name in ("failing", "whole")
    )
    assert list(results) == ["easyvqa_gen"]
    assert results["easyvqa_gen"]["metrics"] == whole["easyvqa_gen"]["metrics"]
