"""From a pool of tars and a subset of uids to training tars: the chosen samples, their bytes untouched.

    tars of the pool ── pool_index.py, a task for each ──► .work/index-*.parquet ── layout ─┐
                 └───── bytes ──► tar_writing.py, a task for each output tar ◄──────────────┘
                                    └─► 00000.tar, 00000.index.parquet, ...; missing.npy; reshard.json (last)

The layout is made from the subset, the order of the pool and the options alone: the outputs are the same bytes with
any number of workers, and after any number of kills.
"""

import functools
import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ...files import content_hash, describe_shards, remove_temporaries, write_json
from ...output_lock import only_writer
from ...places import Place, absolute, is_remote, place
from ...transfers import make_folder, remove_tree
from ..engine.engine import ShardTask, process_rank, run_tasks
from ..storage.tars import find_tars
from ..storage.uids import read_uids, write_uids
from .new_captions import NewCaptions, find_captions
from .options import ReshardOptions
from .pool_index import Layout, PoolIndexer, count_captions, read_figures, write_layout
from .tar_writing import TarWriter, index_name

RESHARD_NAME = "reshard.json"
MISSING_NAME = "missing.npy"
FORMAT_VERSION = 1
_WORK, _RECIPE = ".work", "recipe.json"


@dataclass
class ReshardReport:
    """Figures of a whole run, parts of killed runs included.

    Attributes:
        samples (`int`): in the pool, those that are skipped included.
        written (`int`): in the output.
        tars (`int`): of the output.
        uids (`int`): in the subset.
        missing (`int`): of these in no tar of the pool; they stand in `missing.npy`.
        duplicates (`int`): samples left out because their uid came before.
        skipped (`dict[str, int]`): samples that cannot be used, by reason.
        ignored_members (`int`): members of the pool that belong to no sample, as folders and links.
        new_captions (`int`, *optional*): of the output, those with a new caption; `None` if none were given.
        without_caption (`int`): of the output, those that were to get one and for which there is none.
    """

    samples: int
    written: int
    tars: int
    uids: int
    missing: int
    duplicates: int
    skipped: dict[str, int]
    ignored_members: int
    new_captions: int | None = None
    without_caption: int = 0

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.skipped.items())
        lines = {
            "pool": f"{self.samples:,} samples",
            "written": f"{self.written:,} samples, {self.tars:,} tars",
            "missing": f"{self.missing:,} of {self.uids:,} uids" + f" ({MISSING_NAME})" * bool(self.missing),
            "duplicates": f"{self.duplicates:,}",
            "skipped": f"{sum(self.skipped.values()):,}" + (f" ({reasons})" if reasons else ""),
        }
        if self.new_captions is not None:
            lines["captions"] = f"{self.new_captions:,} new, {self.written - self.new_captions:,} of the pool" + (
                f" ({self.without_caption:,} for want of a new one)" * bool(self.without_caption)
            )
        if self.ignored_members:
            lines["ignored"] = f"{self.ignored_members:,} members that are no file of a sample (folders, links, ...)"
        return "\n".join(f"{name:<11}{value}" for name, value in lines.items())


def reshard(options: ReshardOptions) -> ReshardReport:
    """Copy the samples of a subset into new tars. The same input gives the same bytes, with any number of workers.

    Args:
        options ([`ReshardOptions`]): what is resharded, and how.

    Returns:
        [`ReshardReport`].

    Raises:
        ValueError: for files of another form, a folder with other tars in it, or if no sample of the pool is in the
            subset.
        OSError: if a file cannot be read or written.
    """
    if process_rank()[1] > 1:
        raise ValueError("reshard is one command that starts its own workers: run it without accelerate launch")
    tars, folder = find_tars(options.pool), place(options.output)
    folder = folder if is_remote(folder) else folder.resolve()
    if any((tar if is_remote(tar) else tar.resolve()).parent == folder for tar in tars):
        raise ValueError(f"{options.output}: the pool has tars in this folder; choose another output")
    recipe = {
        "format_version": FORMAT_VERSION,
        "subset": _describe_subset(options.subset),
        "samples_per_shard": options.samples_per_shard,
        "shuffle_seed": options.seed if options.shuffle else None,
        "shards": describe_shards(tars, folder),
        "captions": None,
    }
    captions = find_captions(options.captions) if options.captions else {}
    if captions:
        recipe["captions"] = {
            "files": describe_shards(list(captions.values()), folder),
            "share": options.caption_share,
            "seed": options.seed,
        }
    with only_writer(folder):
        work = folder / _WORK
        _claim(folder, recipe)
        finished = _finished_report(folder)
        if finished is None:
            engine_options = {"engine": options.engine, "num_workers": options.num_workers}
            new = NewCaptions(captions, options.caption_share, options.seed) if captions else None
            finished = _make(folder, work, absolute(place(options.subset)), tars, new, recipe, engine_options)
        remove_tree(work)
    return finished


def _make(
    folder: Place,
    work: Place,
    subset: Place,
    tars: list[Place],
    captions: NewCaptions | None,
    recipe: dict[str, Any],
    engine: dict[str, Any],
) -> ReshardReport:
    """All steps; those of an earlier run that are finished are not done again."""
    indexes = [index_name(work, number) for number in range(len(tars))]
    tasks = [ShardTask(absolute(tar), index) for tar, index in zip(tars, indexes, strict=True)]
    run_tasks(tasks, functools.partial(PoolIndexer, str(subset), captions), description="indexing", **engine)
    figures = [read_figures(index) for index in indexes]
    _check_names(tars, figures)
    uids = read_uids(subset)
    seen, duplicates = write_layout(work, indexes, len(uids))
    layout = Layout(work, recipe["shuffle_seed"])
    if not layout.total:
        raise ValueError(f"{subset}: none of its {len(uids)} uids is in the pool")
    new, without = (None, 0) if captions is None else count_captions(work, indexes)
    if new == 0:
        raise ValueError("--captions: no sample of the subset has a caption there that is to be taken")
    count = -(-layout.total // recipe["samples_per_shard"])
    outputs = [folder / f"{number:05d}.index.parquet" for number in range(count)]
    remove_temporaries(
        [*(folder / f"{n:05d}.tar" for n in range(count)), folder / MISSING_NAME, folder / RESHARD_NAME]
    )
    make_writer = functools.partial(TarWriter, folder, work, str(subset), recipe)
    # All are of one size, so that any file may be the measure of the work.
    run_tasks([ShardTask(subset, path) for path in outputs], make_writer, description="writing", **engine)
    if not seen.all():
        write_uids(folder / MISSING_NAME, uids[~seen])
    report = ReshardReport(
        samples=sum(one["samples"] for one in figures),
        written=layout.total,
        tars=count,
        uids=len(uids),
        missing=len(uids) - int(seen.sum()),
        duplicates=duplicates,
        skipped=dict(sorted(sum((Counter(one["skipped"]) for one in figures), Counter()).items())),
        ignored_members=sum(one["ignored_members"] for one in figures),
        new_captions=new,
        without_caption=without,
    )
    write_json(folder / RESHARD_NAME, {"recipe": recipe, "totals": asdict(report)}, sort_keys=True)
    return report


def _describe_subset(subset: str | Place) -> dict[str, Any]:
    """By content: the same subset may be written again."""
    return {"name": place(subset).name, "sha256": content_hash(subset)}


def _claim(folder: Place, recipe: dict[str, Any]) -> None:
    """Make the folder this recipe's, or make sure that it is."""
    advice = f"delete {folder} or choose another output"
    known = folder / _WORK / _RECIPE
    finished = folder / RESHARD_NAME
    if finished.exists():
        made = _read_json(finished).get("recipe", {})
    elif known.exists():
        made = _read_json(known)
    else:
        stranger = next(folder.glob("*.tar"), None)
        if stranger is not None:
            raise ValueError(f"{stranger}: a tar that reshard has not made; {advice}")
        made = recipe
    for name, value in recipe.items():
        if made.get(name) != value:
            what = {"shards": "other or changed tars", "subset": "another subset", "captions": "other captions"}
            what = what.get(name)
            found = what or f"{name} {made.get(name)}, now {value}"
            raise ValueError(f"{folder}: made with {found}; {advice}")
    make_folder(folder / _WORK)
    remove_temporaries([known])
    write_json(known, recipe, sort_keys=True)


def _read_json(path: Place) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not as reshard writes it; delete it")
    return content


def _finished_report(folder: Place) -> ReshardReport | None:
    """The figures of a run that has come to its end and whose files are all there."""
    path = folder / RESHARD_NAME
    if not path.exists():
        return None
    try:
        report = ReshardReport(**_read_json(path)["totals"])
    except (KeyError, TypeError):
        raise ValueError(f"{path}: not as reshard writes it; delete it") from None
    names = (f"{n:05d}{suffix}" for n in range(report.tars) for suffix in (".tar", ".index.parquet"))
    return report if all((folder / name).exists() for name in names) else None


def _check_names(tars: list[Place], figures: list[dict[str, Any]]) -> None:
    """Uids that are made of a tar's name and a key tell nothing apart if two tars have that name."""
    named: dict[str, tuple[Place, bool]] = {}
    for tar, figure in zip(tars, figures, strict=True):
        other, unnamed = named.setdefault(tar.name, (tar, bool(figure["unnamed"])))
        if other is not tar and (unnamed or figure["unnamed"]):
            raise ValueError(f"{other} and {tar} have one name, and samples without a uid in a json: rename one")
