"""Runs a step of the data pipeline: one function of one shard, on many shards, here or on a cluster.

    tasks (source, output) ─┬─ local: this process, or a pool of processes ──┐
       not yet done         ├─ ray: actors of a Ray cluster, with GPUs ──────┼─► outcomes ─► progress bar, StepReport
                            └─ accelerate launch: every rank takes its share ┘

The output of a task is its done-marker: written whole, then renamed. A rerun does what is missing. Each worker process
calls `make_worker` once (it may load a model) and then its result on one task after the other.
"""

import contextlib
import errno
import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

from tqdm import tqdm

from ...files import remove_temporaries
from ...places import Place, identities
from ..storage.tars import TAR_DAMAGE
from .ray_engine import work_on_ray
from .worker import LazyWorker, Task

logger = logging.getLogger(__name__)

ENGINES = ("local", "ray")
LOGGED_SKIPS = 3  # of each reason, and each damaged tar


class ShardTask(NamedTuple):
    """One shard's part of a step."""

    source: Place  # what it is made from, usually a tar; its size is the measure of the work
    output: Place  # the file that is there when the task is done

    def __str__(self) -> str:
        return str(self.output)


class Outcome(NamedTuple):
    """What the main process hears of a finished task."""

    samples: int  # samples seen, those left out included
    skipped: dict[str, int]  # how many were left out, by reason
    examples: list[tuple[str, ...]]  # file, key, reason and perhaps a detail of some of them, for the log
    notes: Counter[str] = Counter()  # what else a step counts

    @classmethod
    def of(cls, samples: int, skipped: Sequence[tuple[str, ...]]) -> "Outcome":
        """From all that was left out, with examples of each reason and every damaged tar."""
        counts = Counter(row[2] for row in skipped)
        return cls(samples, dict(counts), list(_worth_logging(skipped, Counter())))


@dataclass
class StepReport:
    """Figures of one run of a step (of one rank's share under `accelerate launch`)."""

    samples: int = 0  # samples of the shards that this run has done
    skipped: Counter = field(default_factory=Counter)  # those left out, by reason
    shards: int = 0  # tasks that this run has done
    done_before: int = 0  # tasks that an earlier run has done

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self.skipped.items()))
        lines = {
            "shards": f"{self.shards:,}" + (f" ({self.done_before:,} done before)" if self.done_before else ""),
            "samples": f"{self.samples:,}",
            "skipped": f"{self.skipped.total():,}" + (f" ({reasons})" if reasons else ""),
        }
        return "\n".join(f"{name:<11}{value}" for name, value in lines.items())


def has_output(task: ShardTask) -> bool:
    """Whether an earlier run has done a task."""
    return task.output.exists()


def run_tasks(
    tasks: Sequence[ShardTask],
    make_worker: Callable[[], Callable[[ShardTask], Outcome]],
    *,
    engine: str = "local",
    num_workers: int | None = None,
    num_gpus: float = 0,
    description: str,
    is_done: Callable[[ShardTask], bool] = has_output,
) -> StepReport:
    """Do the tasks whose output is missing; that the others were made with the same options is checked before.

    `make_worker` makes the function of a task, and can be pickled. `num_workers` are processes or actors (of
    `num_gpus` each): by default one per core, or as many as the cluster allows; 1 is, locally, this process. `is_done`
    tells which tasks an earlier run has done. A worker that is killed is a `ChildProcessError`.
    """
    rank, ranks = process_rank()
    mine = tasks[rank::ranks]  # by position and not by what is missing, which changes while the other ranks work
    missing = [task for task in mine if not is_done(task)]
    remove_temporaries(task.output for task in missing)
    sizes = dict(zip(missing, _sizes([task.source for task in missing]), strict=True))
    report = StepReport(done_before=len(mine) - len(missing))
    outcomes = work_through(missing, make_worker, engine=engine, num_workers=num_workers, num_gpus=num_gpus)
    sized = ((sizes[task], outcome) for task, outcome in outcomes)
    for outcome in show_progress(sized, sum(sizes.values()), description):
        report.samples += outcome.samples
        report.skipped.update(outcome.skipped)
        report.shards += 1
    return report


def _sizes(sources: Sequence[Place]) -> list[int]:
    found = identities(sources)
    for source, known in zip(sources, found, strict=True):
        if known is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(source))
    return [known["size"] for known in found]


def process_rank() -> tuple[int, int]:
    """Rank of this process among those of `accelerate launch` or `torchrun`, and their number; 0 and 1 without."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def work_through(
    tasks: Sequence[Task],
    make_worker: Callable[[], Callable[[Task], Any]],
    *,
    engine: str = "local",
    num_workers: int | None = None,
    num_gpus: float = 0,
) -> Iterator[tuple[Task, Any]]:
    """Each task with what its worker returned, in the order in which they get done; options as of [`run_tasks`]."""
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine}")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")
    if not tasks:
        return iter(())
    if engine == "ray":
        return work_on_ray(tasks, make_worker, num_workers, num_gpus)
    num_workers = num_workers or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if min(num_workers, len(tasks)) == 1:
        worker = LazyWorker(make_worker)
        return ((task, worker(task)) for task in tasks)
    return _in_processes(tasks, make_worker, min(num_workers, len(tasks)))


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection inside of it; also a decorator.

    For what makes many small objects without cycles, as an index does: the collector would walk through them, and
    through all of the imported libraries, again and again, for half of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def show_progress(outcomes: Iterable[tuple[int, Outcome]], total: int, description: str) -> Iterator[Outcome]:
    """Pass outcomes, each with the amount of its work, through a bar in samples; log the first of what is skipped."""
    logged: Counter = Counter()
    skipped: Counter = Counter()
    finished = 0
    quiet = not total or process_rank()[0] != 0
    with tqdm(desc=description, unit=" samples", unit_scale=True, disable=quiet) as bar:
        for amount, outcome in outcomes:
            finished += amount
            # How many samples there are is known at the end only; the bytes left tell about how many.
            bar.total = round((bar.n + outcome.samples) * total / max(1, finished))
            bar.update(outcome.samples)
            skipped.update(outcome.skipped)
            if outcome.skipped:
                bar.set_postfix(dict(skipped.most_common(LOGGED_SKIPS)), refresh=False)
            for file, key, reason, *detail in _worth_logging(outcome.examples, logged):
                logger.warning("skipped %s/%s: %s%s", file, key, reason, f" ({detail[0]})" if any(detail) else "")
            yield outcome


def _in_processes(
    tasks: Sequence[Task], make_worker: Callable[[], Callable[[Task], Any]], num_workers: int
) -> Iterator[tuple[Task, Any]]:
    context = multiprocessing.get_context("forkserver")
    module = getattr(make_worker, "func", make_worker).__module__
    context.set_forkserver_preload([module])  # imported once instead of by each worker
    others = set(multiprocessing.active_children())
    begun = context.RawArray("q", len(tasks))  # by which process; without a lock, which a killed one could keep
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(make_worker, begun)) as pool:
        with deaf_to_ctrl_c():
            futures = {pool.submit(_work, number, task): task for number, task in enumerate(tasks)}
            workers = set(multiprocessing.active_children()) - others
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        except BrokenProcessPool as error:
            pool.shutdown(cancel_futures=True)  # ends the other workers, by SIGTERM
            raise ChildProcessError(_what_died(workers, begun, tasks)) from error
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C, or nobody wants the rest: no task is waited for
                for worker in workers:
                    worker.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _what_died(workers: Iterable[multiprocessing.Process], begun: Sequence[int], tasks: Sequence[Any]) -> str:
    """The worker that was not ended for another one, what of, and the last task that it began."""
    dead = next((worker for worker in workers if worker.exitcode not in (None, 0, -signal.SIGTERM)), None)
    if dead is None:
        return "a worker process was ended"
    at = [f" at {task}" for task, process in zip(tasks, begun, strict=True) if process == dead.pid][-1:]
    if dead.exitcode > 0:
        return f"a worker process ended itself{''.join(at)}, with exit code {dead.exitcode}"
    hint = ", perhaps for want of memory: try fewer workers" if dead.exitcode == -signal.SIGKILL else ""
    return f"a worker process was killed by {signal.Signals(-dead.exitcode).name}{''.join(at)}{hint}"


@contextlib.contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that are started in here do not hear Ctrl-C, which is for the one that ends them.

    A terminal sends it to all, and each would print where it was. The signal is blocked and not ignored: here it comes
    when the block ends.
    """
    resource_tracker.ensure_running()  # when it starts it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: Callable[[Any], Any] | None = None  # of this process, if it is one of a pool
_begun: Any = None  # of the pool


def _start_worker(make_worker: Callable[[], Callable[[Any], Any]], begun: Any) -> None:
    global _worker, _begun
    _worker, _begun = LazyWorker(make_worker), begun
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process for each core already
    gc.freeze()  # or every full collection walks through the million objects of the imported libraries
    parent = multiprocessing.parent_process()
    # The workers of a pool outlive a parent that was killed, and would write beside the rerun.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _work(number: int, task: Any) -> Any:
    _begun[number] = os.getpid()
    return _worker(task)


def _worth_logging(skipped: Iterable[tuple[str, ...]], seen: Counter) -> Iterator[tuple[str, ...]]:
    for row in skipped:
        seen[row[2]] += 1
        if seen[row[2]] <= LOGGED_SKIPS or row[2] in TAR_DAMAGE:
            yield row
