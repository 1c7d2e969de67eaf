"""What does the tasks of a pool or of an actor."""

from collections.abc import Callable
from typing import Any, TypeVar

Task = TypeVar("Task")


class LazyWorker:
    """A worker that is made at its first task, so that what `make_worker` raises is raised by a task."""

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]]):
        self._make_worker = make_worker
        self._worker: Callable[[Any], Any] | None = None

    def __call__(self, task: Any) -> Any:
        """Do a task."""
        if self._worker is None:
            self._worker = self._make_worker()
        return self._worker(task)
