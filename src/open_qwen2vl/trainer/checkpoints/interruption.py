"""SIGTERM, a launcher that died, and two runs in one folder.

A training that is asked to leave finishes its step, saves a checkpoint and ends with exit code 143, as its scheduler
expects. A run that is started again while the old process is still writing waits for it.
"""

import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

EXIT_CODE = 128 + signal.SIGTERM
LOCK_NAME = ".lock"
LOCK_SECONDS = 120  # longer than a step and a checkpoint take, mostly
# Set by `accelerate launch` and torchrun: without them the parent is a shell, which may well end before the training.
LAUNCHER_VARIABLES = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")


class FolderInUse(ValueError):
    """Another process trains in the folder."""


class StopRequest:
    """Whether this process was asked to leave: by SIGTERM, or by the death of its launcher."""

    def __init__(self):
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM as a request. More of them change nothing: schedulers and launchers both send one.

        Only the main thread may do so; in any other nothing is listened to.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._on_signal)
        over = threading.Event()
        if any(name in os.environ for name in LAUNCHER_VARIABLES):
            threading.Thread(target=self._watch_parent, args=(os.getppid(), over), daemon=True).start()
        try:
            yield
        finally:
            over.set()
            signal.signal(signal.SIGTERM, before)

    def _on_signal(self, number: int, frame: object) -> None:
        self.requested = True

    def _watch_parent(self, parent: int, over: threading.Event) -> None:
        # A launcher that is killed leaves its processes behind, which would train on unseen.
        while not over.wait(1):
            if os.getppid() != parent:
                self.requested = True
                return


@contextmanager
def only_run_in(output_dir: str | os.PathLike, writes: bool) -> Iterator[None]:
    """Hold the lock of a run's folder; it is free again as soon as the process is gone, however it went.

    Args:
        output_dir (`str` or `os.PathLike`): the folder; it is made.
        writes (`bool`): whether this rank is the one that writes checkpoints; the others take no lock.

    Raises:
        FolderInUse: if another process still holds it after two minutes.
    """
    if not writes:
        yield
        return
    path = Path(output_dir) / LOCK_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        _wait_for(file, path)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _wait_for(file, path: Path) -> None:
    give_up = time.monotonic() + LOCK_SECONDS
    told = False
    while True:
        try:
            # POSIX locks belong to the process alone: the loader's forked workers do not keep them.
            return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read() or "unknown"
            if time.monotonic() > give_up:
                raise FolderInUse(f"process {holder} is training in {path.parent}: wait for it or stop it") from None
            if not told:
                logger.warning("waiting for process %s, which still writes to %s", holder, path.parent)
                told = True
            time.sleep(0.2)
