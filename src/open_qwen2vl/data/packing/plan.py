"""The planner: which documents share a pack, found from texts and headers alone; no image is decoded.

    files ── groups of `shards_per_group` tars or of `records_per_group` records, one task each
               │ documents.py: locations, lengths          │ pack_lengths: packs of a group
               ▼                                           ▼
             part-00000.arrow, skipped-00000.parquet (plan_files.py) ──► plan.json

Packs never mix groups, so that reading one stays local. What a file is: sources.py. A part is its own done-marker: it
is renamed into place when it is whole and carries what it was made from. A rerun makes the missing parts only;
`plan.json` is written last: of several ranks (`accelerate launch`) by the one that finds all parts there.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...families import difference, document_processor
from ...families.interface import DocumentProcessor, Media
from ...files import content_hash, describe_shard, describe_shards, remove_temporaries, shard_path
from ...options import flag
from ...output_lock import check_store, only_writer
from ...places import Place, is_remote, place
from ...processing.text_formats import tokenizer_fingerprint
from ...processing.tool_forms import TOOL_FORMS
from ..documents.documents import Group, Skipped, plan_group
from ..documents.forms import RULES, conversation_format
from ..documents.shared_pictures import share_pictures
from ..documents.sources import SourceKind, source_kind
from ..documents.unread import warn_of_unread_fields
from ..engine.engine import Outcome, process_rank, show_progress, work_through
from ..storage.image_files import describe_images, index_archives, remove_index
from ..storage.tar_index import index_elsewhere
from .bins import pack_lengths
from .options import PackOptions
from .plan_files import (
    FIGURES_NAME,
    FORMAT_VERSION,
    PARTS_NAME,
    PLAN_NAME,
    SHARDS_NAME,
    packs_table,
    part_name,
    read_part_figures,
    read_part_metadata,
    write_part,
    write_plan,
    write_skipped,
)
from .plan_report import PlanReport

logger = logging.getLogger(__name__)

# Options of a plan that a family may have (`DocumentProcessor.plan_options`).
MEDIA_OPTIONS = ("image_seq_length", "min_pixels", "max_pixels", "fixed_resolution", "video_fps", "max_frames",
                 "max_video_tokens", "skip_broken_videos", "text_after_video", "tokens_per_second")  # fmt: skip
_FINISHING_SECONDS = 600  # that a rank waits for another to write what stands beside the parts


@dataclass(frozen=True)
class _Task:
    """One group of files, or of records of a file."""

    number: int
    group: Group

    @property
    def part(self) -> Place:
        return self.group.folder / part_name(self.number)

    def __str__(self) -> str:
        return str(self.part)

    @property
    def skipped(self) -> Place:
        return self.group.folder / f"skipped-{self.number:05d}.parquet"

    @property
    def amount(self) -> int:
        """Of work: bytes, or rows of a table."""
        settings = self.group.settings
        if "range" in settings:
            return settings["range"][1] - settings["range"][0]
        return sum(shard["size"] for shard in settings["shards"])


def plan_packs(
    shards: Sequence[str | Place], output: str | Place, processor: Any, **options: Any
) -> PlanReport | None:
    """Plan the packs of captions, texts, interleaved documents or conversations.

    The same input gives the same plan, with any number of workers, on Ray, or by several ranks, each of which makes
    its share of the parts.

    Args:
        shards (`Sequence[str | Place]`): files of one kind of `sources.py`; [`find_sources`] lists those of a folder.
        output (`str | Place`): folder of the plan, which is locked meanwhile. Finished parts in it are kept.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): of a family of `families/`; for Open-Qwen2VL a fast
            tokenizer after [`prepare_tokenizer`] is enough.
        options: fields of [`PackOptions`].

    Returns:
        [`PlanReport`]: figures of the whole plan, parts of earlier runs included; `None` on a rank that has made its
        parts while others are at work on theirs.

    Raises:
        ValueError: for an option out of range, no shards, a folder with parts of another plan or that another process
            plans in ([`FolderInUse`]), or if not a single sample can be packed.
        OSError: if a file cannot be read.
    """
    chosen = PackOptions(tuple(map(str, shards)), str(output), **options)
    if not shards:
        raise ValueError("no shards given: name at least one tar, or one file of conversations")
    kind = source_kind(shards, chosen.caption_column, bool(chosen.images))
    _check_options(kind, chosen)
    warn_of_unread_fields(shards[0], kind)
    media = {name: getattr(chosen, name) or None for name in MEDIA_OPTIONS}
    documents = document_processor(processor, chat_template=chosen.chat_template, **media)
    _check_room(kind, chosen, documents)
    rank, ranks = process_rank()
    with only_writer(output, rank=rank, ranks=ranks):
        return _plan(kind, shards, chosen, documents)


def _plan(
    kind: SourceKind, shards: Sequence[str | Place], chosen: PackOptions, documents: DocumentProcessor
) -> PlanReport | None:
    """Make the parts of this rank that are missing, then plan.json if all are there."""
    folder = place(chosen.output)
    settings = _settings(kind, chosen, documents, folder)
    described, indexes = describe_shards(shards, folder), _indexes(kind, chosen)
    tasks = [
        _Task(number, Group(folder, files, {**settings, "shards": [described[i] for i in files], **cut}, indexes))
        for number, (files, cut) in enumerate(_groups(kind, shards, chosen))
    ]
    if not tasks:
        raise ValueError(f"{shards[0]}: not a single record in it")
    rank, ranks = process_rank()
    mine = tasks[rank::ranks]  # by position and not by what is missing, which changes while the other ranks work
    remove_temporaries(path for task in mine for path in (task.part, task.skipped))
    if indexes is not None and indexes.exists():
        remove_temporaries(index_elsewhere(indexes, shards[i]) for task in mine for i in task.group.shards)
    missing = _missing_parts(folder, tasks, mine)
    if missing and chosen.images:
        index_archives(folder, settings["images"])
    _run(missing, documents, chosen)
    remove_index(folder)
    if ranks > 1 and not all(task.part.exists() for task in tasks):
        return None
    # Two ranks may find all parts there: the second then finds all files there, too.
    remove_index(folder, of_all_ranks=True)
    with only_writer(folder / PLAN_NAME, "finishing", is_file=True, patience=_FINISHING_SECONDS):
        remove_temporaries(folder / name for name in (PLAN_NAME, SHARDS_NAME, PARTS_NAME, FIGURES_NAME))
        return _finish(folder, settings, described, tasks)


def _indexes(kind: SourceKind, options: PackOptions) -> Place | None:
    """Where indexes are made of tars that have none: of captions alone, for a document may hold its images."""
    if kind.images_elsewhere:
        return None
    folder = place(options.output)
    if not options.indexes:
        return folder.with_name(f"{folder.name}_indexes")
    indexes = place(options.indexes)
    if is_remote(indexes):
        check_store(options.indexes)
    elif file := next((one for one in (indexes, *indexes.parents) if one.is_file()), None):
        raise ValueError(f"--indexes {indexes}: {file} is a file, not a folder")
    return indexes


def _settings(kind: SourceKind, options: PackOptions, documents: DocumentProcessor, folder: Place) -> dict[str, Any]:
    """All that a plan depends on but its files."""
    settings: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "text_format": kind.text_format,
        "tokenizer": tokenizer_fingerprint(documents.tokenizer),
        "vision": documents.fingerprint(),
        "max_length": options.max_length,
        "max_images": options.max_images,
        "images": describe_images(options.images, folder),
    }
    if options.subset is not None:
        uids = {"path": describe_shard(options.subset, folder)["path"], "sha256": content_hash(options.subset)}
        settings["subset"] = uids
    if kind.text_format == "conversation":
        settings["chat_template"] = conversation_format(documents).fingerprint
        if options.chat_template is not None:
            settings["chat_template_name"] = options.chat_template
        if options.tool_form != TOOL_FORMS[0]:
            settings["tool_form"] = options.tool_form
        if options.share_images:
            settings["share_images"] = True
    elif kind.text_format == "interleaved":
        settings["rules"] = options.rules
    else:
        settings |= {"caption_column": kind.caption_column, "text_only": options.text_only}
        if options.animations:
            settings["animations"] = True
    return settings


def _check_options(kind: SourceKind, options: PackOptions) -> None:
    for name in (*MEDIA_OPTIONS, "max_images", "shards_per_group", "records_per_group", "num_workers"):
        value = getattr(options, name)
        if isinstance(value, float) and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0, got {value}")
        if isinstance(value, int) and value < 1 and value is not False:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if options.engine == "ray" and process_rank()[1] > 1:
        raise ValueError("--engine ray starts its own workers: run it without accelerate launch")
    if options.images and not kind.images_elsewhere:
        raise ValueError("images are for conversations, documents and tables: those of captions are in their tars")
    if options.indexes and kind.images_elsewhere:
        raise ValueError(f"--indexes is for tars of captions, not for {kind.text_format}s in {kind.suffixes[0]} files")
    if options.rules not in RULES:
        raise ValueError(f"rules must be {' or '.join(RULES)}, got {options.rules!r}")
    if options.rules != RULES[0] and kind.text_format != "interleaved":
        raise ValueError(f"rules {options.rules} are for interleaved documents, not for {kind.text_format}s")
    if options.text_only and kind.text_format != "caption":
        raise ValueError(f"text_only is for captions, not for {kind.text_format}s")
    if options.tool_form not in TOOL_FORMS:
        raise ValueError(f"tool_form must be {' or '.join(TOOL_FORMS)}, got {options.tool_form!r}")
    if options.animations and kind.text_format not in ("caption", "text"):
        raise ValueError(f"animations is for captions; in {kind.text_format}s the records say what is a video")
    for name in ("tool_form", "share_images", "chat_template"):
        if getattr(options, name) not in (None, False, TOOL_FORMS[0]) and kind.text_format != "conversation":
            raise ValueError(f"{flag(name)} is for conversations, not for {kind.text_format}s")


def _check_room(kind: SourceKind, options: PackOptions, documents: DocumentProcessor) -> None:
    """Refuse packs that no image with a text fits into; where sizes decide, that is found image by image."""
    if kind.text_format in ("conversation", "text") or documents.needs_sizes:
        return
    layout = documents.text_format
    image = len(documents.placeholder_ids(Media("image")))
    shortest = len(layout.document_start) + image + 1 + len(layout.document_end)
    if options.max_length < shortest:
        raise ValueError(
            f"max_length {options.max_length} is below {shortest}, the shortest document with images of {image} tokens"
        )


def _groups(
    kind: SourceKind, paths: Sequence[str | Place], options: PackOptions
) -> Iterator[tuple[range, dict[str, Any]]]:
    """The files of each group by their index, and the range of a file of several groups."""
    if str(paths[0]).endswith(".tar"):
        for start in range(0, len(paths), options.shards_per_group):
            yield range(start, min(start + options.shards_per_group, len(paths))), {}
        return
    for number, path in enumerate(paths):
        for start, stop in kind.cut(path, options.records_per_group):
            yield range(number, number + 1), {"range": [start, stop]}


def _missing_parts(folder: Place, tasks: list[_Task], mine: list[_Task]) -> list[_Task]:
    """Of some tasks those still to do; raises if one is of another plan, or the folder holds parts of one."""
    advice = f"delete {folder} or choose another output"
    there = {part for suffix in ("arrow", "parquet") for part in folder.glob(f"part-*.{suffix}")}
    strangers = sorted(there - {task.part for task in tasks})
    if strangers:
        older = strangers[0].suffix == ".parquet"
        raise ValueError(
            f"{strangers[0]}: part of {'an older plan' if older else 'a plan with more groups'}; {advice}"
        )
    missing = []
    for task in mine:
        if task.part not in there:
            missing.append(task)
            continue
        made = read_part_metadata(task.part).get("settings", {})
        for name in {**task.group.settings, **made}:
            value = task.group.settings.get(name)
            if made.get(name) != value:
                raise ValueError(f"{task.part}: made with {_what_differs(name, made.get(name), value)}; {advice}")
    return missing


def _what_differs(name: str, made: Any, now: Any) -> str:
    what = {"shards": "files", "images": "image folders or archives", "subset": "uids of --subset"}.get(name)
    if what:
        return f"other or changed {what}"
    return difference(made, now) if isinstance(made, dict) else f"{name} {made}, now {now}"


def _run(tasks: list[_Task], documents: DocumentProcessor, options: PackOptions) -> None:
    """Make parts, in this process or in several, each of which gets a copy of the family's processor."""
    make_worker = functools.partial(_part_maker, documents)
    outcomes = work_through(tasks, make_worker, engine=options.engine, num_workers=options.num_workers)
    sized = ((task.amount, outcome) for task, outcome in outcomes)
    indexes: Counter[str] = Counter()  # all else stands in the parts
    for outcome in show_progress(sized, sum(task.amount for task in tasks), "planning"):
        indexes += outcome.notes
    if indexes:
        level = logging.INFO if set(indexes) <= {"made", "read"} else logging.WARNING
        logger.log(level, "indexes of tars: %s", ", ".join(f"{n:,} {what}" for what, n in sorted(indexes.items())))


def _part_maker(documents: DocumentProcessor) -> Callable[[_Task], Outcome]:
    return functools.partial(_make_part, documents=documents)


def _make_part(task: _Task, documents: DocumentProcessor) -> Outcome:
    """The whole work on one group."""
    settings = task.group.settings
    planned, skipped, ignored, broken, indexes, not_chosen = plan_group(task.group, documents)
    limit = settings["max_images"]
    if limit is not None:
        paths = dict(zip(task.group.shards, (shard["path"] for shard in settings["shards"]), strict=True))
        skipped = skipped + [
            Skipped(paths[document.shard], document.key, "too_many_images", f"{len(document.images)} images")
            for document in planned
            if len(document.images) > limit
        ]
        planned = [document for document in planned if len(document.images) <= limit]
    shared, unshared = share_pictures(planned, settings["max_length"], limit)
    lengths = np.array([sum(one.tokens for one in own) for own in shared], dtype=np.int64)
    images = np.array([sum(len(one.own_images) for one in own) for own in shared], dtype=np.int64)
    packs = pack_lengths(lengths, settings["max_length"], images, limit)
    planned = [document for own in shared for document in own]
    table = packs_table(planned, np.repeat(packs, [len(own) for own in shared]))
    videos = sum(image.frames > 0 for document in planned for image in document.own_images)
    report = PlanReport.of_part(
        table, settings["max_length"], skipped, ignored, videos, broken, dict(unshared), not_chosen
    )
    write_skipped(task.skipped, skipped)
    write_part(task.part, table, {"settings": settings, "report": asdict(report)})
    return Outcome.of(report.samples, skipped)._replace(notes=indexes)


def _finish(folder: Place, settings: dict[str, Any], shards: list[dict[str, Any]], tasks: list[_Task]) -> PlanReport:
    """Sum up the parts and write plan.json."""
    total = PlanReport.of_parts([PlanReport(**read_part_metadata(task.part)["report"]) for task in tasks])
    if not total.samples and total.not_chosen:
        for task in tasks:  # or the right subset would be refused as another one
            task.part.unlink(missing_ok=True)
            task.skipped.unlink(missing_ok=True)
        raise ValueError(f"--subset: it has none of the {total.not_chosen:,} samples of these files")
    if not total.samples:
        raise ValueError(f"{shard_path(folder, shards[0])}: not a single record in it")
    if not total.packs:
        raise ValueError(f"none of {total.samples} samples can be packed: {total.skipped}")
    totals = {**asdict(total), "fill": total.fill, "shards": len(shards), "parts": len(tasks)}
    write_plan(folder, {**settings, "totals": totals}, shards, [read_part_figures(task.part) for task in tasks])
    return total
