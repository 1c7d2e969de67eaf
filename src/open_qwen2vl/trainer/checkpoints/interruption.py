"""SIGTERM, a launcher that died, and two runs in one folder.

A training that is asked to leave finishes its step, saves a checkpoint and ends with exit code 143, as its scheduler
expects. A run that is started again while the old process is still writing waits for it.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ...output_lock import FolderInUse, only_writer

__all__ = ["EXIT_CODE", "FolderInUse", "StopRequest", "only_run_in"]

EXIT_CODE = 128 + signal.SIGTERM
LOCK_SECONDS = 120  # longer than a step and a checkpoint take, mostly
# Set by `accelerate launch` and torchrun: without them the parent is a shell, which may well end before the training.
LAUNCHER_VARIABLES = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")


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
        # The handler only sets a flag, so that a step is never cut in half.
        before = signal.signal(signal.SIGTERM, self._on_signal)
        # Ends the watch with this training: a process may run several.
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
    """Hold the lock of a run's folder, on the rank that writes checkpoints; `FolderInUse` if it stays taken."""
    with only_writer(output_dir, "training in", patience=LOCK_SECONDS) if writes else nullcontext():
        yield
