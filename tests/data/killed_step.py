"""Kill a step of the data pipeline at random moments, run it again, and compare with a run that nobody disturbed.

    check_killed_step(["reshard", str(pool), "--samples-per-shard", "10", "--output", OUTPUT], tmp_path, kills=3)

`OUTPUT` in the command stands for a folder (also as a part of an argument, `f"{OUTPUT}/subset.npy"`). The command runs
once to its end; then, each time in a fresh folder, it gets a SIGKILL at a random moment after it has begun to write,
and runs again to its end. A killed run may leave temporary and working files, but a file under its final name is
whole; its worker processes die by themselves; the rerun ends with the very same files and bytes.

A step is `open-qwen2vl ARGUMENTS` in a process that is forked from one with everything imported (`preload` names
further modules that the step imports), so a kill costs as much as the step itself and not the imports again. Worker
processes of the step would import everything anew in each run: `--num-workers 1`, but for a test of just that.
"""

import concurrent.futures
import functools
import importlib.util
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

OUTPUT = "{OUTPUT}"
DEATH_SECONDS = 20


def check_killed_step(
    command: Sequence[str], root: Path, *, kills: int = 3, seed: int = 0, preload: Sequence[str] = ()
) -> None:
    """Kill a step `kills` times and assert all of the above; `root` is an empty folder for the outputs."""
    _killer(tuple(preload)).submit(_check, list(command), root, kills, seed).result()


def read_folder(folder: Path) -> dict[str, bytes]:
    """All files below a folder by their relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_and_kill(command: Sequence[str], output: Path, after: float) -> bool:
    """Start a step, kill it `after` seconds after the first file in `output`; whether it was still running then."""
    step = _start(command, output)
    while step.is_alive() and not any(output.iterdir()):
        time.sleep(0.0005)
    step.join(after)
    killed = step.is_alive()
    step.kill()
    step.join()
    assert killed or step.exitcode == 0, f"{command} failed by itself"
    return killed


@functools.cache
def _killer(preload: tuple[str, ...]) -> concurrent.futures.Executor:
    """A process that starts and kills steps, with a fork server of its own; several checks share it."""
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, spawn, initializer=_import_first, initargs=(preload,))


def _import_first(preload: tuple[str, ...]) -> None:
    steps = ("packing.plan", "filtering.selection", "resharding.resharding", "scoring.kinds", "recaptioning.recaption")
    modules = ["open_qwen2vl.cli", "openai", *(f"open_qwen2vl.data.{step}" for step in steps), __name__, *preload]
    assert all(importlib.util.find_spec(name) for name in modules)  # the fork server says nothing about a wrong name
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)


def _check(command: list[str], root: Path, kills: int, seed: int) -> None:
    whole, moments = root / "whole", random.Random(seed)
    _start(["--help"], whole).join()  # starts the server
    idle = _children()
    # The first run also waits for what nobody has imported or read yet.
    seconds = min(_run(command, whole), _run(command, root / "again"))
    expected, done = read_folder(whole), 0
    for attempt in range(4 * kills):
        output = root / f"killed{attempt}"
        if not run_and_kill(command, output, moments.uniform(0, seconds)):
            continue  # it was faster this time
        assert psutil.wait_procs(_children() - idle, DEATH_SECONDS)[1] == [], "workers outlive the killed step"
        left = read_folder(output)
        assert [name for name in expected if left.get(name, expected[name]) != expected[name]] == []
        _run(command, output)
        assert_same_files(read_folder(output), expected)
        done += 1
        if done == kills:
            return
    raise AssertionError(f"only {done} of {kills} kills came before the step's end: give it more to do")


def assert_same_files(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Assert equality of folders and, where there is none, name the files and not their content."""
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def _run(command: Sequence[str], output: Path) -> float:
    """Run a step to its end; the seconds since its first file."""
    step = _start(command, output)
    while step.is_alive() and not any(output.iterdir()):
        time.sleep(0.0005)
    started = time.monotonic()
    step.join()
    assert step.exitcode == 0, f"{command} failed"
    return time.monotonic() - started


def _start(command: Sequence[str], output: Path) -> multiprocessing.Process:
    output.mkdir(exist_ok=True)
    arguments = [argument.replace(OUTPUT, str(output)) for argument in command]
    step = multiprocessing.get_context("forkserver").Process(target=_main, args=(arguments,))
    step.start()
    return step


def _main(arguments: list[str]) -> None:
    from open_qwen2vl.cli import main

    sys.exit(main(arguments))


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))
