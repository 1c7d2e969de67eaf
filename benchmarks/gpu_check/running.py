"""Stages in processes of their own, each with a budget of seconds; what they found is kept case by case.

    record (gpu.json) ◄── a process per stage writes `running`, then `done`, `skipped` or `failed` of each case
          └── what is done stays done: the same command goes on, and tries again what failed or was skipped

A process that dies takes one case with it: the next process begins with the case after.
"""

import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Outcome = dict[str, Any]


class Skip(Exception):  # noqa: N818
    """A case that does not apply here, and why."""


@dataclass(frozen=True)
class Stage:
    """A question to the GPU, answered case by case."""

    title: str
    budget: int  # seconds, the start of its processes included
    cases: dict[str, Callable[[Any], Outcome]]


@dataclass
class Record:
    """What is known so far, in a file that is whole at any moment."""

    path: Path
    machine: dict[str, str] = field(default_factory=dict)
    stages: dict[str, dict[str, Outcome]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record of a file, an empty one where there is none; ValueError for another file."""
        if not path.exists():
            return cls(path)
        try:
            content = json.loads(path.read_text(encoding="utf8"))
            return cls(path, content["machine"], content["stages"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no record of gpu-check: remove it, or give another --output") from None

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"machine": self.machine, "stages": self.stages}, indent=1), encoding="utf8")
        partial.replace(self.path)

    def begin(self, machine: dict[str, str]) -> None:
        """Take up the machine; what is not done is tried again: a package may be there now, or more memory.

        ValueError where the record is of another card, model or torch.
        """
        for name in ("card", "model", "torch") if self.machine else ():
            if self.machine[name] != machine[name]:
                raise ValueError(
                    f"{self.path} is of {name} {self.machine[name]}, and this is {machine[name]}: "
                    "remove the file, or give another --output"
                )
        self.machine = machine
        self.stages = {
            stage: {case: outcome for case, outcome in cases.items() if "done" in outcome}
            for stage, cases in self.stages.items()
        }
        self.write()

    def settle(self, stage: str, case: str, outcome: Outcome) -> None:
        self.stages.setdefault(stage, {})[case] = outcome
        self.write()

    def of(self, stage: str, case: str) -> Outcome:
        return self.stages.get(stage, {}).get(case, {})

    def open_cases(self, stage: str, cases: Iterable[str]) -> list[str]:
        """Cases of which nothing is known yet."""
        return [case for case in cases if not self.of(stage, case)]


def run_cases(record: Record, name: str, stage: Stage, bench: Any) -> None:
    """In the stage's process: every open case, up to one that fails.

    The next process goes on: a CUDA context may answer nothing any more, and what was allocated may not be free.
    """
    for case in record.open_cases(name, stage.cases):
        record.settle(name, case, {"running": True})
        outcome = run_case(stage.cases[case], bench)
        record.settle(name, case, outcome)
        if "failed" in outcome:
            return


def run_case(case: Callable[[Any], Outcome], bench: Any) -> Outcome:
    """What a case found, or why it found nothing."""
    started = time.perf_counter()
    try:
        return {"done": case(bench), "seconds": round(time.perf_counter() - started, 1)}
    except Skip as skip:
        return {"skipped": str(skip)}
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        return {"failed": f"{type(error).__name__}: {first}"[:300]}


def run_stage(path: Path, name: str, stage: Stage, command: list[str], log: Path, budget: float) -> Record:
    """In the parent: processes until every case is settled or the time is over; returns the record as it is then.

    What they print goes to the file `log`.
    """
    ends = time.monotonic() + budget
    record = Record.read(path)
    while waiting := record.open_cases(name, stage.cases):
        code = _run_process(command, log, ends - time.monotonic())
        record = Record.read(path)
        over = code is None
        reason = f"over the stage's {budget:.0f} s" if over else f"its process ended with {code}: {_last_line(log)}"
        for case in stage.cases:
            if "running" in record.of(name, case):
                record.settle(name, case, {"failed": reason})
        still = record.open_cases(name, stage.cases)
        if over or still == waiting:
            for case in still:
                record.settle(name, case, {"skipped": "no time was left"} if over else {"failed": reason})
    return record


def _run_process(command: list[str], log: Path, seconds: float) -> int | None:
    """Exit code, or None: it was ended, for its time was over."""
    if seconds <= 0:
        return None
    with log.open("a", encoding="utf8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # And the workers of its loader; also where this process is interrupted.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"
