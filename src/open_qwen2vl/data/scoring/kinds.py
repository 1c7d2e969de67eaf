"""Which scorers there are, the options of each, and the step that runs one over a pool."""

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...files import describe_shard
from ..engine.engine import Outcome, ShardTask, StepReport, run_tasks
from ..storage.tars import find_shards
from .score_files import read_score_metadata
from .scoring import TarScorer

SCORERS = {  # by name, the options that each takes; the first of some cannot be left out
    "clip": ("model", "pretrained", "batch_size", "device"),
    "mlm-filter": ("model", "metric", "prompts", "decode", "batch_size", "device"),
    "metadata": ("columns",),
    "basic": (),
    "image-hash": (),
}
_WITH_MODEL = ("clip", "mlm-filter")
_WITHOUT_EFFECT = ("batch_size", "device")  # on what the values mean; not compared by a rerun
_RAY_THREADS = 4  # of an actor that scores with a model
_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)


def score_pool(
    paths: Sequence[str | Path],
    output: str | Path,
    scorer: str,
    *,
    name: str | None = None,
    num_workers: int | None = None,
    engine: str = "local",
    gpus_per_worker: float | None = None,
    **options: Any,
) -> StepReport:
    """Score a pool, one file for each shard; a rerun makes what is missing.

    Args:
        paths (`Sequence[str | Path]`): tars and folders of tars; for `metadata`, parquet files and folders of them.
        output (`str | Path`): folder; the files are `OUTPUT/NAME/TAR.parquet`.
        scorer (`str`): one of `SCORERS`.
        name (`str`, *optional*): what the scores are called, by default as the scorer.
        num_workers (`int`, *optional*): with a model, threads that decode for it (by default one per core; 4 for an
            actor of Ray); without one, processes (by default one per core) or actors.
        engine (`str`, *optional*, defaults to `"local"`): `"local"` or `"ray"`.
        gpus_per_worker (`float`, *optional*): GPUs of each Ray actor with a model; by default 1, or 0 on the device
            `cpu`.
        options: those of the scorer; `None` stands for its default.

    Returns:
        [`StepReport`]: of this run.

    Raises:
        ValueError: for options that do not fit, two shards of one file name, score files that were made from
            something else, or a model that cannot be loaded.
        OSError: if a file cannot be read.
    """
    options = {key: value for key, value in options.items() if value is not None}
    _check_options(scorer, options, engine, gpus_per_worker)
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"--num-workers must be at least 1, got {num_workers}")
    name = name or scorer
    if not _NAME.fullmatch(name):
        raise ValueError(f"--name {name}: a name has letters, digits, '_', '-' and '.', and no digit first")
    folder = Path(output) / name
    sources = _find_tables(paths) if scorer == "metadata" else find_shards(paths)
    recipe = _recipe(scorer, name, options, folder)
    tasks = _tasks(sources, folder)
    _check_finished(tasks, recipe)
    workers, gpus, threads = num_workers, 0.0, 0
    if scorer in _WITH_MODEL:
        workers, gpus, threads = _share(engine, num_workers, gpus_per_worker, options)
    make_worker = _make_worker(scorer, options, name, recipe, threads)
    return run_tasks(
        tasks, make_worker, engine=engine, num_workers=workers, num_gpus=gpus, description=f"scoring {name}"
    )


def _check_options(scorer: str, options: dict[str, Any], engine: str, gpus_per_worker: float | None) -> None:
    if scorer not in SCORERS:
        raise ValueError(f"--scorer {scorer}: known are {', '.join(SCORERS)}")
    strangers = [_flag(option) for option in options if option not in SCORERS[scorer]]
    if strangers:
        raise ValueError(f"--scorer {scorer} takes no {', '.join(strangers)}")
    for option in SCORERS[scorer][:1]:
        if not options.get(option):
            raise ValueError(f"--scorer {scorer} needs {_flag(option)}")
    if options.get("batch_size", 1) < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options['batch_size']}")
    if gpus_per_worker is not None and (engine != "ray" or scorer not in _WITH_MODEL):
        raise ValueError(f"--gpus-per-worker is for --engine ray with {' or '.join(_WITH_MODEL)}")


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _share(
    engine: str, num_workers: int | None, gpus_per_worker: float | None, options: dict[str, Any]
) -> tuple[int | None, float, int]:
    """Workers, GPUs of each and threads of each, where a model scores."""
    if engine == "ray":
        gpus = float(options.get("device") != "cpu") if gpus_per_worker is None else gpus_per_worker
        return None, gpus, num_workers or _RAY_THREADS
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 1, 0.0, num_workers or max(1, (os.cpu_count() or 1) // ranks)


def _make_worker(
    scorer: str, options: dict[str, Any], name: str, recipe: dict[str, Any], num_threads: int
) -> Callable[[], Callable[[ShardTask], Outcome]]:
    """What makes a worker of the engine; libraries are imported when it is called."""
    if scorer == "metadata":
        from .metadata import TableScorer

        return functools.partial(TableScorer, options["columns"], name, recipe)
    if scorer == "image-hash":
        from .image_hash import TarHasher

        return functools.partial(TarHasher, name, recipe)
    if scorer == "clip":
        from .clip import ClipScorer as kind
    elif scorer == "basic":
        from .basic import BasicScorer as kind
    else:
        from .mlm_filter import MlmFilterScorer as kind

        options = dict(options)
        options["metrics"] = options.pop("metric", ["all"])
    return functools.partial(TarScorer, functools.partial(kind, **options), name, recipe, num_threads)


def _find_tables(paths: Sequence[str | Path]) -> list[Path]:
    tables: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: no .parquet file in this folder")
        tables += found
    for table in tables:
        if table.suffix != ".parquet":
            raise ValueError(f"{table}: --scorer metadata reads parquet files")
    return find_shards(tables)


def _recipe(scorer: str, name: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    described = {key: _describe(value, folder) for key, value in options.items() if key not in _WITHOUT_EFFECT}
    return {"scorer": scorer, "name": name, "options": described}


def _describe(value: Any, folder: Path) -> Any:
    """An option as it is kept: a file or folder with its size and date, anything else as it is."""
    if not isinstance(value, str):
        return value
    path = Path(value.removeprefix("local-dir:"))
    if not path.exists():
        return value
    described = describe_shard(path, folder)
    if path.is_dir():
        stats = [file.stat() for file in path.iterdir() if file.is_file()]
        described["size"] = sum(stat.st_size for stat in stats)
        described["mtime_ns"] = max((stat.st_mtime_ns for stat in stats), default=0)
    return described


def _tasks(sources: Sequence[Path], folder: Path) -> list[ShardTask]:
    tasks: dict[Path, ShardTask] = {}
    for source in sources:
        task = ShardTask(source, folder / f"{source.stem}.parquet")
        if task.output in tasks:
            raise ValueError(
                f"{tasks[task.output].source} and {source} have one name and would share {task.output}: "
                "score them with two values of --output"
            )
        tasks[task.output] = task
    return list(tasks.values())


def _check_finished(tasks: Sequence[ShardTask], recipe: dict[str, Any]) -> None:
    """Raise if a score file of an earlier run was made from something else."""
    for task in tasks:
        if not task.output.exists():
            continue
        made = read_score_metadata(task.output).get("recipe", {})
        changed = []
        if made.get("source") != describe_shard(task.source, task.output.parent):
            changed.append(f"another or a changed {task.source}")
        if made.get("scorer") != recipe["scorer"]:
            changed.append(f"--scorer {made.get('scorer')}, now {recipe['scorer']}")
        before, now = made.get("options", {}), recipe["options"]
        for option in sorted(before.keys() | now.keys()):
            if before.get(option) != now.get(option):
                changed.append(f"{_flag(option)} {_named(before.get(option))}, now {_named(now.get(option))}")
        if changed:
            advice = f"delete {task.output.parent} or choose another --output or --name"
            raise ValueError(f"{task.output}: made with {'; '.join(changed)}; {advice}")


def _named(value: Any) -> str:
    return f"{value['path']} of {value['size']} bytes" if isinstance(value, dict) else str(value or "its default")
