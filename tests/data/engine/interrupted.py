"""A command whose tasks take ten minutes, for Ctrl-C: `python -m tests.data.engine.interrupted FOLDER WAY`."""

import functools
import importlib
import os
import sys
import time
from pathlib import Path

import duckdb

from open_qwen2vl import cli
from open_qwen2vl.data.engine.engine import Outcome, ShardTask, run_tasks


def work(folder: Path, task: ShardTask) -> Outcome:
    """Say who works, and go on for long."""
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(600)
    return Outcome(1, {}, [])


def make_worker(folder: Path):
    """The worker of a pool."""
    return functools.partial(work, folder)


def run(options) -> None:
    """What takes the place of a command's work."""
    folder, way = Path(options.results[0]), options.results[1]
    if way == "query":
        (folder / f"{os.getpid()}.pid").touch()
        duckdb.sql("SELECT sum(a.range * b.range) FROM range(1000000) a, range(10000000) b").fetchall()
    tasks = [ShardTask(Path(__file__), folder / f"{number}.out") for number in range(4)]
    run_tasks(tasks, functools.partial(make_worker, folder), num_workers=2, engine=way, description="sleeping")


if __name__ == "__main__":
    # Of the module under its own name, which worker processes import.
    cli.report.run = importlib.import_module("tests.data.engine.interrupted").run
    sys.exit(cli.main(["report", *sys.argv[1:]]))
