"""The data engine's second form: the same tasks on the actors of a Ray cluster.

Without a cluster (`RAY_ADDRESS`, or one that `ray start` has started on this machine) Ray is started here. All files
must lie where every machine sees them under the same path.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .worker import LazyWorker, Task

RETRIES = 3  # of an actor whose machine is taken away


def work_on_ray(
    tasks: Sequence[Task], make_worker: Callable[[], Callable[[Task], Any]], num_workers: int | None, num_gpus: float
) -> Iterator[tuple[Task, Any]]:
    """Apply a worker to each task, on the actors of a Ray cluster.

    A task whose machine is taken away is done again on another one.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise ValueError('--engine ray needs ray: pip install "open-qwen2vl[ray]"') from error
    ours, actors, done = not ray.is_initialized(), 0, set()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        actors = min(num_workers or _capacity(ray.cluster_resources(), num_gpus), len(tasks))
        actor = ray.remote(num_cpus=1, num_gpus=num_gpus, max_restarts=RETRIES, max_task_retries=RETRIES)(_Actor)
        pool = ActorPool([actor.remote(make_worker) for _ in range(actors)])
        found = pool.map_unordered(lambda actor, number: actor.work.remote(number, tasks[number]), range(len(tasks)))
        for number, result in found:
            done.add(number)
            yield tasks[number], result
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # what the worker raised, as it would be without Ray
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        # Each actor has one task at a time, and they are begun in order.
        begun = [str(task) for number, task in enumerate(tasks[: len(done) + actors]) if number not in done]
        told = " ".join(str(error).split())[:300]
        raise ChildProcessError(f"a Ray actor died {RETRIES + 1} times at {' or '.join(begun)}: {told}") from error
    finally:
        if ours:
            ray.shutdown()


class _Actor:
    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]]):
        self._worker = LazyWorker(make_worker)

    def work(self, number: int, task: Any) -> tuple[int, Any]:
        """Do a task; its number tells which, for results come in any order."""
        return number, self._worker(task)


def _capacity(resources: dict[str, float], num_gpus: float) -> int:
    """Actors that fit a cluster."""
    actors = int(resources.get("CPU", 0))
    if num_gpus:
        actors = min(actors, int(resources.get("GPU", 0) / num_gpus))
    if not actors:
        found = f"{resources.get('CPU', 0):g} cores and {resources.get('GPU', 0):g} GPUs"
        raise ValueError(f"the Ray cluster has {found}: too little for a worker of 1 core and {num_gpus:g} GPUs")
    return actors
