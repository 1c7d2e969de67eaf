"""The planner: which documents share a pack, found from texts and headers alone; no image is read.

    tars ── groups of `shards_per_group`, one task each ──► part-00000.parquet, skipped-00000.parquet ──► plan.json
             index, read texts, tokenise, pack_lengths       (what stands in them: plan_files.py)

Packs never mix groups, so that reading one stays local. A part is its own done-marker: it is renamed into place when
it is whole and carries what it was made from. A rerun makes the missing parts only; `plan.json` is written last.
"""

import functools
import logging
import multiprocessing
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..processing.text_formats import caption_document_length, prepare_tokenizer, tokenizer_fingerprint
from .captions import caption_documents
from .packing import pack_lengths
from .plan_files import (
    FORMAT_VERSION,
    describe_shard,
    packs_table,
    read_part_metadata,
    remove_temporaries,
    shard_path,
    write_part,
    write_plan,
    write_skipped,
)
from .plan_report import PlanReport
from .shards import TAR_DAMAGE

logger = logging.getLogger(__name__)

LOGGED_SKIPS = 3  # of each reason, and each damaged tar; all of them stand in the skipped files


@dataclass(frozen=True)
class _Task:
    """One group of tars. `recipe` is all that its part depends on."""

    number: int
    first_shard: int
    folder: Path
    recipe: dict[str, Any]

    @property
    def part(self) -> Path:
        return self.folder / f"part-{self.number:05d}.parquet"

    @property
    def skipped(self) -> Path:
        return self.folder / f"skipped-{self.number:05d}.parquet"

    @property
    def bytes(self) -> int:
        return sum(shard["size"] for shard in self.recipe["shards"])


@dataclass(frozen=True)
class _Done:
    """What the main process hears of a finished part."""

    samples: int
    bytes: int
    skipped: list[tuple[str, str, str]]  # the first of each reason


def plan_packs(
    shards: Sequence[str | Path],
    output: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_seq_length: int = 144,
    max_length: int = 4096,
    shards_per_group: int = 8,
    num_workers: int | None = None,
) -> PlanReport:
    """Plan the packs of caption tars. The same input gives the same plan, whatever the number of workers.

    Args:
        shards (`Sequence[str | Path]`): uncompressed WebDataset tars; [`find_shards`] lists those of a folder.
        output (`str | Path`): folder of the plan, for one planner at a time. Finished parts in it are kept.
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer after [`prepare_tokenizer`].
        image_seq_length (`int`, *optional*, defaults to 144): tokens per image.
        max_length (`int`, *optional*, defaults to 4096): positions of a pack.
        shards_per_group (`int`, *optional*, defaults to 8): tars whose samples may share packs.
        num_workers (`int`, *optional*): processes; where not given one per core, but no more than there are groups.

    Returns:
        [`PlanReport`]: figures of the whole plan, parts of earlier runs included.

    Raises:
        ValueError: for an option out of range, no shards, a folder with parts of another plan, or if not a single
            sample can be packed.
        OSError: if a tar cannot be read.
    """
    _check_options(image_seq_length, max_length, shards_per_group, num_workers)
    if not shards:
        raise ValueError("no shards given: name at least one tar")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "format_version": FORMAT_VERSION,
        "text_format": "caption",
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "image_seq_length": image_seq_length,
        "max_length": max_length,
    }
    described = [describe_shard(shard, folder) for shard in shards]
    tasks = [
        _Task(number, start, folder, {**options, "shards": described[start : start + shards_per_group]})
        for number, start in enumerate(range(0, len(described), shards_per_group))
    ]
    remove_temporaries(folder)
    missing = _missing_parts(folder, tasks)
    workers = num_workers or min(len(missing), os.cpu_count() or 1)
    _follow(_run(missing, tokenizer, workers), sum(task.bytes for task in missing))
    return _finish(folder, {**options, "shards": described}, tasks)


def _check_options(image_seq_length: int, max_length: int, shards_per_group: int, num_workers: int | None) -> None:
    options = {"image_seq_length": image_seq_length, "shards_per_group": shards_per_group, "num_workers": num_workers}
    for name, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    shortest = caption_document_length(1, image_seq_length)
    if max_length < shortest:
        raise ValueError(
            f"max_length {max_length} is below {shortest}, the shortest document with image_seq_length "
            f"{image_seq_length}"
        )


def _missing_parts(folder: Path, tasks: list[_Task]) -> list[_Task]:
    """Tasks still to do; raises if the folder holds parts of another plan."""
    advice = f"delete {folder} or choose another output"
    strangers = sorted(set(folder.glob("part-*.parquet")) - {task.part for task in tasks})
    if strangers:
        raise ValueError(f"{strangers[0]}: part of a plan with more groups of tars; {advice}")
    missing = []
    for task in tasks:
        if not task.part.exists():
            missing.append(task)
            continue
        made = read_part_metadata(task.part)["recipe"]
        for name, value in task.recipe.items():
            if made.get(name) != value:
                found = "other or changed tars" if name == "shards" else f"{name} {made.get(name)}, now {value}"
                raise ValueError(f"{task.part}: made with {found}; {advice}")
    return missing


def _run(tasks: list[_Task], tokenizer: PreTrainedTokenizerBase, num_workers: int) -> Iterator[_Done]:
    """Make parts, in this process or in several; yields as they get done."""
    if num_workers <= 1 or len(tasks) <= 1:
        yield from (_make_part(task, tokenizer) for task in tasks)
        return
    with tempfile.TemporaryDirectory() as tokenizer_folder:
        tokenizer.save_pretrained(tokenizer_folder)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once instead of by each worker
        with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker) as pool:
            futures = [pool.submit(_make_part_in_worker, task, tokenizer_folder) for task in tasks]
            try:
                yield from (future.result() for future in as_completed(futures))
            finally:
                pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process for each core already
    parent = multiprocessing.parent_process()
    # The workers of a pool outlive a parent that was killed, and would write beside the rerun.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _make_part_in_worker(task: _Task, tokenizer_folder: str) -> _Done:
    return _make_part(task, _load_tokenizer(tokenizer_folder, task.recipe["tokenizer"]))


@functools.cache
def _load_tokenizer(folder: str, fingerprint: str) -> PreTrainedTokenizerBase:
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    if tokenizer_fingerprint(tokenizer) != fingerprint:
        raise ValueError("the tokenizer is another one after save_pretrained; use num_workers 1")
    return tokenizer


def _make_part(task: _Task, tokenizer: PreTrainedTokenizerBase) -> _Done:
    """The whole work on one group of tars."""
    recipe, documents, skipped, ignored = task.recipe, [], [], 0
    for number, shard in enumerate(recipe["shards"], start=task.first_shard):
        found = caption_documents(
            shard_path(task.folder, shard), number, tokenizer, recipe["image_seq_length"], recipe["max_length"]
        )
        documents += found.documents
        skipped += [(shard["path"], key, reason) for key, reason in found.skipped]
        ignored += found.ignored_members
    lengths = np.array([document.tokens for document in documents], dtype=np.int64)
    table = packs_table(documents, pack_lengths(lengths, recipe["max_length"]))
    report = PlanReport.of_part(table, recipe["max_length"], skipped, ignored)
    write_skipped(task.skipped, skipped)
    write_part(task.part, table, {"recipe": recipe, "report": asdict(report)})
    return _Done(report.samples, task.bytes, list(_worth_logging(skipped, Counter())))


def _worth_logging(skipped: Iterable[tuple[str, str, str]], seen: Counter) -> Iterator[tuple[str, str, str]]:
    for row in skipped:
        seen[row[2]] += 1
        if seen[row[2]] <= LOGGED_SKIPS or row[2] in TAR_DAMAGE:
            yield row


def _follow(parts: Iterator[_Done], total_bytes: int) -> None:
    """Show progress, in samples, and log the first of what is skipped."""
    seen: Counter = Counter()
    finished_bytes = 0
    with tqdm(desc="planning", unit=" samples", unit_scale=True, disable=not total_bytes) as bar:
        for part in parts:
            finished_bytes += part.bytes
            # How many samples there are is known at the end only; the bytes left tell about how many.
            bar.total = round((bar.n + part.samples) * total_bytes / max(1, finished_bytes))
            bar.update(part.samples)
            for tar, key, reason in _worth_logging(part.skipped, seen):
                logger.warning("skipped %s/%s: %s", tar, key, reason)


def _finish(folder: Path, plan: dict[str, Any], tasks: list[_Task]) -> PlanReport:
    """Sum up the parts and write plan.json."""
    reports = [PlanReport(**read_part_metadata(task.part)["report"]) for task in tasks]
    total = PlanReport.of_parts(reports)
    if not total.packs:
        raise ValueError(f"none of {total.samples} samples can be packed: {total.skipped}")
    parts = [{"name": task.part.name, "packs": report.packs} for task, report in zip(tasks, reports, strict=True)]
    write_plan(folder, {**plan, "parts": parts, "totals": {**asdict(total), "fill": total.fill}})
    return total
