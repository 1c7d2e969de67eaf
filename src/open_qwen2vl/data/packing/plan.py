"""The planner: which documents share a pack, found from texts and headers alone; no image is read.

    files ── groups of `shards_per_group` tars or of `records_per_group` conversations, one task each
               │ read texts, tokenise, pack_lengths
               ▼
             part-00000.parquet, skipped-00000.parquet (plan_files.py) ──► plan.json

Packs never mix groups, so that reading one stays local. What a file is and how it is read: sources.py. A part is its
own done-marker: it is renamed into place when it is whole and carries what it was made from. A rerun makes the missing
parts only; `plan.json` is written last.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...files import remove_temporaries
from ...processing.conversations import ConversationFormat, training_chat_template
from ...processing.text_formats import caption_document_length, prepare_tokenizer, tokenizer_fingerprint
from ..documents.caption_rows import common_caption_column
from ..documents.interleaved import RULES
from ..documents.sources import SourceKind, planned_kind, source_kind
from ..engine.engine import Outcome, show_progress, work_through
from ..storage.image_files import describe_images, index_archives, remove_index
from .bins import pack_lengths
from .plan_files import (
    FORMAT_VERSION,
    PLAN_NAME,
    Group,
    describe_shard,
    packs_table,
    read_part_metadata,
    write_part,
    write_plan,
    write_skipped,
)
from .plan_report import PlanReport


@dataclass(frozen=True)
class _Task:
    """One group of files, or of records of a file."""

    number: int
    group: Group

    @property
    def part(self) -> Path:
        return self.group.folder / f"part-{self.number:05d}.parquet"

    @property
    def skipped(self) -> Path:
        return self.group.folder / f"skipped-{self.number:05d}.parquet"

    @property
    def amount(self) -> int:
        """Of work: bytes, or rows of a table."""
        recipe = self.group.recipe
        if "range" in recipe:
            return recipe["range"][1] - recipe["range"][0]
        return sum(shard["size"] for shard in recipe["shards"])


def plan_packs(
    shards: Sequence[str | Path],
    output: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_seq_length: int = 144,
    max_length: int = 4096,
    max_images: int | None = None,
    shards_per_group: int = 8,
    images: Sequence[str | Path] = (),
    records_per_group: int = 10_000,
    caption_column: str | None = None,
    rules: str = "standard",
    num_workers: int | None = None,
) -> PlanReport:
    """Plan the packs of captions, interleaved documents or conversations.

    The same input gives the same plan, with any number of workers.

    Args:
        shards (`Sequence[str | Path]`): files of one kind of `sources.py`; [`find_sources`] lists those of a folder.
        output (`str | Path`): folder of the plan, for one planner at a time. Finished parts in it are kept.
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer after [`prepare_tokenizer`].
        image_seq_length (`int`, *optional*, defaults to 144): tokens per image.
        max_length (`int`, *optional*, defaults to 4096): positions of a pack.
        max_images (`int`, *optional*): most images of a pack; a document with more is skipped.
        shards_per_group (`int`, *optional*, defaults to 8): tars whose samples may share packs.
        images (`Sequence[str | Path]`, *optional*): folders, `.tar` and `.zip` files in which images that are named
            by a path are looked up.
        records_per_group (`int`, *optional*, defaults to 10000): records or rows of a file that may share packs.
        caption_column (`str`, *optional*): of tables, `caption` or `text` where not given.
        rules (`str`, *optional*, defaults to `"standard"`): what happens to interleaved documents of ten images and
            more, or longer than a pack: they are split before images, or dropped with `"original"`.
        num_workers (`int`, *optional*): processes; where not given one per core, but no more than there are groups.

    Returns:
        [`PlanReport`]: figures of the whole plan, parts of earlier runs included.

    Raises:
        ValueError: for an option out of range, no shards, a folder with parts of another plan, or if not a single
            sample can be packed.
        OSError: if a file cannot be read.
    """
    if not shards:
        raise ValueError("no shards given: name at least one tar, or one file of conversations")
    kind = source_kind(shards, caption_column)
    numbers = {
        "image_seq_length": image_seq_length,
        "max_images": max_images,
        "shards_per_group": shards_per_group,
        "records_per_group": records_per_group,
        "num_workers": num_workers,
    }
    _check_options(kind, max_length, images, rules, numbers)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "format_version": FORMAT_VERSION,
        "text_format": kind.text_format,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "image_seq_length": image_seq_length,
        "max_length": max_length,
        "max_images": max_images,
    }
    if kind.images_elsewhere:
        options["images"] = describe_images(images, folder)
    options |= _format_options(kind, shards, tokenizer, rules, caption_column)
    described = [describe_shard(shard, folder) for shard in shards]
    tasks = [
        _Task(number, Group(folder, chosen, {**options, "shards": [described[i] for i in chosen], **cut}))
        for number, (chosen, cut) in enumerate(_groups(kind, shards, shards_per_group, records_per_group))
    ]
    if not tasks:
        raise ValueError(f"{shards[0]}: not a single record in it")
    remove_temporaries([folder / PLAN_NAME, *(path for task in tasks for path in (task.part, task.skipped))])
    missing = _missing_parts(folder, tasks)
    if missing and images:
        index_archives(folder, options["images"])
    _run(missing, tokenizer, num_workers or os.cpu_count() or 1)
    remove_index(folder)
    return _finish(folder, {**options, "shards": described}, tasks)


def _format_options(
    kind: SourceKind,
    shards: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    rules: str,
    caption_column: str | None,
) -> dict[str, Any]:
    """What a plan of one text format depends on and the others do not."""
    if kind.text_format == "conversation":
        return {"chat_template": ConversationFormat(tokenizer, training_chat_template(tokenizer)).fingerprint}
    if kind.text_format == "interleaved":
        return {"rules": rules}
    return {"caption_column": common_caption_column(shards, caption_column)} if kind.images_elsewhere else {}


def _check_options(
    kind: SourceKind, max_length: int, images: Sequence[str | Path], rules: str, numbers: dict[str, int | None]
) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if images and not kind.images_elsewhere:
        raise ValueError("images are for conversations, documents and tables: those of captions are in their tars")
    if rules not in RULES:
        raise ValueError(f"rules must be {' or '.join(RULES)}, got {rules!r}")
    if rules != RULES[0] and kind.text_format != "interleaved":
        raise ValueError(f"rules {rules} are for interleaved documents, not for {kind.text_format}s")
    image_seq_length = numbers["image_seq_length"]
    shortest = caption_document_length(1, image_seq_length)
    if kind.text_format != "conversation" and max_length < shortest:
        raise ValueError(
            f"max_length {max_length} is below {shortest}, the shortest document with image_seq_length "
            f"{image_seq_length}"
        )


def _groups(
    kind: SourceKind, paths: Sequence[str | Path], shards_per_group: int, records_per_group: int
) -> Iterator[tuple[range, dict[str, Any]]]:
    """The files of each group by their index, and the range of a file of several groups."""
    if kind.cut is None:
        for start in range(0, len(paths), shards_per_group):
            yield range(start, min(start + shards_per_group, len(paths))), {}
        return
    for number, path in enumerate(paths):
        for start, stop in kind.cut(path, records_per_group):
            yield range(number, number + 1), {"range": [start, stop]}


def _missing_parts(folder: Path, tasks: list[_Task]) -> list[_Task]:
    """Tasks still to do; raises if the folder holds parts of another plan."""
    advice = f"delete {folder} or choose another output"
    strangers = sorted(set(folder.glob("part-*.parquet")) - {task.part for task in tasks})
    if strangers:
        raise ValueError(f"{strangers[0]}: part of a plan with more groups; {advice}")
    missing = []
    for task in tasks:
        if not task.part.exists():
            missing.append(task)
            continue
        made = read_part_metadata(task.part)["recipe"]
        for name, value in task.group.recipe.items():
            if made.get(name) != value:
                what = {"shards": "files", "images": "image folders or archives"}.get(name)
                found = f"other or changed {what}" if what else f"{name} {made.get(name)}, now {value}"
                raise ValueError(f"{task.part}: made with {found}; {advice}")
    return missing


def _run(tasks: list[_Task], tokenizer: PreTrainedTokenizerBase, num_workers: int) -> None:
    """Make parts, in this process or in several."""

    def make_worker() -> Callable[[_Task], Outcome]:
        return functools.partial(_make_part, tokenizer=tokenizer)

    with tempfile.TemporaryDirectory() as folder:
        if min(num_workers, len(tasks)) > 1:
            tokenizer.save_pretrained(folder)
            make_worker = functools.partial(_load_part_maker, folder, tokenizer_fingerprint(tokenizer))
        outcomes = work_through(tasks, make_worker, num_workers=num_workers)
        sized = ((task.amount, outcome) for task, outcome in outcomes)
        for _ in show_progress(sized, sum(task.amount for task in tasks), "planning"):
            pass  # the figures stand in the parts


def _load_part_maker(tokenizer_folder: str, fingerprint: str) -> Callable[[_Task], Outcome]:
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(tokenizer_folder))
    if tokenizer_fingerprint(tokenizer) != fingerprint:
        raise ValueError("the tokenizer is another one after save_pretrained; use num_workers 1")
    return functools.partial(_make_part, tokenizer=tokenizer)


def _make_part(task: _Task, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """The whole work on one group."""
    recipe = task.group.recipe
    kind = planned_kind(recipe)
    documents, skipped, ignored = kind.plan(task.group, tokenizer)
    limit = recipe["max_images"]
    if limit is not None:
        paths = dict(zip(task.group.shards, (shard["path"] for shard in recipe["shards"]), strict=True))
        too_many = [document for document in documents if document.num_images > limit]
        skipped = skipped + [(paths[document.shard], document.key, "too_many_images") for document in too_many]
        documents = [document for document in documents if document.num_images <= limit]
    lengths = np.array([document.tokens for document in documents], dtype=np.int64)
    images = np.array([document.num_images for document in documents], dtype=np.int64)
    table = packs_table(documents, pack_lengths(lengths, recipe["max_length"], images, limit))
    report = PlanReport.of_part(table, recipe["max_length"], skipped, ignored)
    write_skipped(task.skipped, skipped)
    write_part(task.part, table, {"recipe": recipe, "report": asdict(report)})
    return Outcome.of(report.samples, skipped)


def _finish(folder: Path, plan: dict[str, Any], tasks: list[_Task]) -> PlanReport:
    """Sum up the parts and write plan.json."""
    reports = [PlanReport(**read_part_metadata(task.part)["report"]) for task in tasks]
    total = PlanReport.of_parts(reports)
    if not total.packs:
        raise ValueError(f"none of {total.samples} samples can be packed: {total.skipped}")
    parts = [{"name": task.part.name, "packs": report.packs} for task, report in zip(tasks, reports, strict=True)]
    write_plan(folder, {**plan, "parts": parts, "totals": {**asdict(total), "fill": total.fill}})
    return total
