"""The step that runs a scorer over a pool."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...files import describe_shard
from ...options import flag
from ...output_lock import only_writer
from ...places import Place, files_at, is_remote, place
from ..documents.records import JSON, TABLES
from ..documents.sources import find_sources
from ..engine.engine import Outcome, ShardTask, StepReport, has_output, process_rank, run_tasks
from ..storage.image_files import describe_images, index_archives, remove_index
from ..storage.tars import find_shards, find_tars
from .basic import BasicScorer
from .chat_prompts import CONVERSATION
from .conversations import ConversationBasicScorer, ConversationReader, conversation_tasks
from .embeddings import check_embeddings
from .options import WITH_MODEL, ScoreOptions
from .pairs import read_tar
from .score_files import RECORDS_OF, read_score_metadata
from .scoring import TarScorer, describe_source

logger = logging.getLogger(__name__)

_WITHOUT_EFFECT = ("batch_size", "device")  # on what the values mean; not compared by a rerun
_RAY_THREADS = 4  # of an actor that scores with a model


def score_pool(options: ScoreOptions) -> StepReport:
    """Score a pool, one file for each shard; a rerun makes what is missing.

    Args:
        options ([`ScoreOptions`]): what is scored, and how.

    Returns:
        [`StepReport`]: of this run.

    Raises:
        ValueError: for two shards of one file name, score files that were made from something else, or a model that
            cannot be loaded.
        OSError: if a file cannot be read.
    """
    scorer, name, given = options.scorer, options.scores_name, options.of_scorer()
    folder = place(options.output) / name
    recipe = score_recipe(scorer, name, given, folder)
    pool = open_pool(options.pool, options.images, folder, of_tables=scorer == "metadata")
    describe_pool(recipe, pool)
    tasks, read, roots = pool.tasks, pool.read, pool.roots
    check_finished(tasks, recipe)
    workers, gpus, threads = options.num_workers, 0.0, 0
    if scorer in WITH_MODEL:
        workers, gpus, threads = model_workers(options)
    make_worker = _make_worker(scorer, given, name, recipe, threads, read)
    rank, ranks = process_rank()
    if any("size" in root for root in roots) and (ranks > 1 or is_remote(folder)):
        raise ValueError("--images: archives are read by one command, with its --output on this machine: unpack them")
    with only_writer(folder, rank=rank, ranks=ranks), indexed_images(folder, roots):
        return run_tasks(
            tasks,
            make_worker,
            engine=options.engine,
            num_workers=workers,
            num_gpus=gpus,
            description=f"scoring {name}",
            is_done=_has_embeddings if options.keep_embeddings else has_output,
        )


@contextlib.contextmanager
def indexed_images(folder: Place, roots: list[dict[str, Any]]) -> Iterator[None]:
    """An index of the archives among the roots, while it is needed."""
    if not any("size" in root for root in roots):
        yield
        return
    index_archives(folder, roots)
    try:
        yield
    finally:
        remove_index(folder)


def _has_embeddings(task: ShardTask) -> bool:
    """Whether a tar has its scores, and the embeddings that belong to them."""
    if not has_output(task):
        return False
    try:
        check_embeddings(task.output)
    except ValueError as error:
        logger.warning("%s: scored again", error)
        return False
    return True


def model_workers(options: Any) -> tuple[int | None, float, int]:
    """Workers, GPUs of each and threads of each, where a model is at work, by the options that say so."""
    if options.engine == "ray":
        gpus = float(options.device != "cpu") if options.gpus_per_worker is None else options.gpus_per_worker
        return None, gpus, options.num_workers or _RAY_THREADS
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 1, 0.0, options.num_workers or max(1, (os.cpu_count() or 1) // ranks)


def _make_worker(
    scorer: str, options: dict[str, Any], name: str, recipe: dict[str, Any], num_threads: int, read: Callable[..., Any]
) -> Callable[[], Callable[[ShardTask], Outcome]]:
    """What makes a worker of the engine; libraries are imported when it is called."""
    conversations = RECORDS_OF in recipe
    if scorer == "metadata":
        from .metadata import TableScorer

        return functools.partial(TableScorer, options["columns"], name, recipe)
    if scorer == "image-hash":
        from .image_hash import TarHasher

        return functools.partial(TarHasher, name, recipe, read)
    if scorer == "clip":
        from .clip import ClipScorer, ConversationClipScorer

        kind: Any = ConversationClipScorer if conversations else ClipScorer
    elif scorer == "concepts":
        from .concepts import ConceptScorer as kind
    elif scorer == "basic":
        kind = ConversationBasicScorer if conversations else BasicScorer
    else:
        from .mlm_filter import MlmFilterScorer as kind

        options = {**options, "metrics": options.get("metric", ["all"])}
        options.pop("metric", None)
        if conversations:
            options["about"] = CONVERSATION
    return functools.partial(TarScorer, functools.partial(kind, **options), name, recipe, num_threads, read)


class Pool(NamedTuple):
    """What is scored, and how it is read."""

    tasks: list[Any]  # of the engine: tars of pairs, or parts of files of conversations
    read: Callable[..., Any]  # the samples of a task, as [`read_tar`] gives them
    roots: list[dict[str, Any]]  # folders and archives of the images of conversations
    records: str | None  # what stands in it, if not pairs


def open_pool(paths: Sequence[Any], images: Sequence[Any], folder: Place, of_tables: bool = False) -> Pool:
    """The tasks of a pool, whose outputs are in a folder; a `ValueError` for one that cannot be read.

    `of_tables`: its tables are not conversations, but what is scored.
    """
    sources = _find_tables(paths) if of_tables else find_pool(paths)
    if sources[0].suffix in (*JSON, *TABLES) and not of_tables:
        roots = describe_images(images, folder)
        tasks = conversation_tasks(sources, folder, bool(images))
        return Pool(tasks, ConversationReader(folder, roots), roots, "conversations")
    if images:
        raise ValueError("--images is for conversations: the images of captions are in their tars")
    return Pool(shard_tasks(sources, folder), read_tar, [], None)


def describe_pool(recipe: dict[str, Any], pool: Pool) -> None:
    """Add to a recipe what a rerun compares of a pool of conversations."""
    if pool.records:
        recipe[RECORDS_OF] = pool.records
        recipe["options"]["images"] = pool.roots


def find_pool(paths: Sequence[Any]) -> list[Any]:
    """The tars of pairs, or the files of conversations, that the given paths stand for."""
    found = find_sources(paths)
    if all(path.suffix in (*JSON, *TABLES) for path in found):
        return found
    return find_tars(paths)


def _find_tables(paths: Sequence[str | Place]) -> list[Place]:
    tables: list[Place] = []
    for path in paths:
        found = files_at(path, "*.parquet")
        if not found:
            raise ValueError(f"{path}: no .parquet file in this folder")
        tables += found
    for table in tables:
        if table.suffix != ".parquet":
            raise ValueError(f"{table}: --scorer metadata reads parquet files")
    return find_shards(tables)


def score_recipe(scorer: str, name: str, options: dict[str, Any], folder: Place) -> dict[str, Any]:
    """What a rerun compares; the source of each score file is added to it."""
    described = {key: describe_option(value, folder) for key, value in options.items() if key not in _WITHOUT_EFFECT}
    return {"scorer": scorer, "name": name, "options": described}


def describe_option(value: Any, folder: Place) -> Any:
    """An option as it is kept: a file or folder with its size and date, anything else as it is."""
    if not isinstance(value, str):
        return list(value) if isinstance(value, tuple) else value
    path = Path(value.removeprefix("local-dir:"))
    if not path.exists():
        return value
    described = describe_shard(path, folder)
    if path.is_dir():
        stats = [file.stat() for file in path.iterdir() if file.is_file()]
        described["size"] = sum(stat.st_size for stat in stats)
        described["mtime_ns"] = max((stat.st_mtime_ns for stat in stats), default=0)
    return described


def shard_tasks(sources: Sequence[Place], folder: Place) -> list[ShardTask]:
    """A task for each source, whose output has its name; a `ValueError` for two of one name."""
    tasks: dict[Place, ShardTask] = {}
    for source in sources:
        task = ShardTask(source, folder / f"{source.stem}.parquet")
        if task.output in tasks:
            raise ValueError(
                f"{tasks[task.output].source} and {source} have one name and would share {task.output}: "
                "score them with two values of --output"
            )
        tasks[task.output] = task
    return list(tasks.values())


def check_finished(tasks: Sequence[ShardTask], recipe: dict[str, Any]) -> None:
    """Raise if a score file of an earlier run was made from something else."""
    for task in tasks:
        if not task.output.exists():
            continue
        made = read_score_metadata(task.output).get("recipe", {})
        changed = []
        if made.get("source") != describe_source(task):
            changed.append(f"another or a changed {task.source}")
        if made.get("scorer") != recipe["scorer"]:
            changed.append(f"--scorer {made.get('scorer')}, now {recipe['scorer']}")
        if made.get("algorithm") != recipe.get("algorithm"):
            before = made.get("algorithm", "of an older version")
            changed.append(f"the algorithm {before}, now {recipe.get('algorithm')}")
        before, now = made.get("options", {}), recipe["options"]
        for option in sorted(before.keys() | now.keys()):
            if before.get(option) != now.get(option):
                changed.append(f"{flag(option)} {_named(before.get(option))}, now {_named(now.get(option))}")
        if changed:
            advice = f"choose another --output, or delete {task.output.parent}"
            raise ValueError(f"{task.output}: made with {'; '.join(changed)}; {advice}")


def _named(value: Any) -> str:
    return f"{value['path']} of {value['size']} bytes" if isinstance(value, dict) else str(value or "its default")
