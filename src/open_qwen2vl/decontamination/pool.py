"""The step: an index of the evaluation sets, its self-test, then a score file for each tar of the pool."""

import contextlib
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from ..data.engine.engine import Outcome, ShardTask, run_tasks
from ..data.scoring.kinds import check_finished, shard_tasks
from ..data.scoring.pairs import RawPair, read_pairs
from ..data.scoring.score_files import DETAIL, score_table
from ..data.scoring.scoring import write_tar_scores
from ..data.storage.tars import find_tars, index_shard
from ..files import describe_shard
from ..output_lock import only_writer
from ..places import is_remote, place
from ..processing.images import decode_image, to_rgb
from ..processing.sample_error import SampleError
from ..transfers import local_copy
from .attacks import clean_alarms, self_test
from .index import DECODED_SIZE, PLAIN, ContaminationIndex, Match, build_index
from .options import DecontaminateOptions
from .report import DecontaminationReport, count_found, write_report
from .sets import EvaluationSet, fetch_sets, find_sets, read_set

NAME = "contaminated"
_LABELS = [f"{NAME}.image", f"{NAME}.text"]
_MODEL = "crops-64x64-dct/13-grams"


class _Looked(NamedTuple):
    """What a sample is like."""

    image: Match
    text: Match
    reason: str | None  # why its picture cannot be compared


def decontaminate(options: DecontaminateOptions) -> DecontaminationReport:
    """Look for evaluation pictures and texts in a pool; a rerun makes what is missing.

    Args:
        options ([`DecontaminateOptions`]): what is looked for, and where.

    Returns:
        [`DecontaminationReport`]: how well changed pictures are found, and what was found.

    Raises:
        ValueError: for a set of no known form, or scores that were made against other sets.
        OSError: if a file cannot be read or written.
    """
    folder = place(options.output) / NAME
    if is_remote(folder) and options.engine == "ray":
        raise ValueError(f"--engine ray: the index of the sets is a mapped file, which {options.output} cannot hold")
    tasks = shard_tasks(find_tars(options.pool), folder)
    with only_writer(folder), tempfile.TemporaryDirectory(prefix="open-qwen2vl-") as scratch:
        sets = fetch_sets(find_sets(options.against), Path(scratch))
        # What is mapped lies on this machine: a remote output has no index, each run makes it.
        against = (Path(scratch) / ".index" if is_remote(folder) else folder) / "against"
        made = build_index(against, sets)
        recipe = {"scorer": "decontaminate", "name": NAME, "options": {"against": made["sets"]}}
        check_finished(tasks, recipe)
        index = ContaminationIndex(against)
        samples = _sample_pictures(index, sets, options.self_test)
        attacks, alarms = self_test(index, samples), clean_alarms(index, samples)
        step = run_tasks(
            tasks,
            functools.partial(PoolChecker, against, recipe),
            engine=options.engine,
            num_workers=options.num_workers,
            description="looking for evaluation samples",
        )
        report = DecontaminationReport(
            step=step,
            contents=made["contents"],
            texts_left_out=made["texts_left_out"],
            attacks=attacks,
            compared=len(samples),
            alike=[(index.names[entry], index.names[other]) for entry, other in alarms],
            found=count_found([task.output for task in tasks]),
        )
        write_report(folder, report)
    return report


def _sample_pictures(
    index: ContaminationIndex, sets: Sequence[EvaluationSet], count: int
) -> list[tuple[int, Image.Image]]:
    """Number and picture of `count` entries, evenly spread; the sets are read again for them."""
    entries = np.unique(index.owners)
    chosen = set(entries[np.unique(np.linspace(0, len(entries) - 1, min(count, len(entries))).astype(int))].tolist())
    found, readable = [], (entry for each in sets for entry in read_set(each) if not isinstance(entry, SampleError))
    for number, entry in enumerate(readable):
        if number in chosen:
            with contextlib.suppress(SampleError):  # the entry has another picture that can be compared
                image = entry.images[0]
                image = decode_image(image) if isinstance(image, bytes) else to_rgb(image)
                index.similarities(image)
                found.append((number, image))
    return found


class PoolChecker:
    """Looks through one tar after the other, for one worker of the engine."""

    def __init__(self, index: Path, recipe: dict[str, Any]):
        self._index = ContaminationIndex(index)
        self._recipe = recipe

    def __call__(self, task: ShardTask) -> Outcome:
        """Compare the samples of a tar."""
        with local_copy(task.source) as tar:  # all of it is read
            index = index_shard(tar)
            samples = list(read_pairs(tar, index.samples, self._look))
        keys, uids, looked, reasons = zip(*samples, strict=True) if samples else ((),) * 4
        values = np.full((len(samples), 2), np.nan)
        details: list[list[str | None]] = [[], []]
        skipped, plain = list(index.skipped), [None] * len(samples)
        for row, (sample, one) in enumerate(zip(samples, looked, strict=True)):
            if one is None:
                skipped.append((sample.key, sample.reason))
            elif one.reason:
                skipped.append((sample.key, one.reason))
                plain[row] = one.reason
            for part, match in enumerate((one.image, one.text) if one else (None, None)):
                details[part].append(self._named(match))
                # What shows too little to be told from others is in no index either.
                if match is not None and (part == 1 or one.reason in (None, PLAIN)):
                    values[row, part] = match.similarity
        why = [reason or other for reason, other in zip(reasons, plain, strict=True)]
        table = score_table(_LABELS, _MODEL, keys, uids, values, why, None)
        table = table.append_column(DETAIL, pa.array(details[0] + details[1], pa.string()))
        recipe = {**self._recipe, "source": describe_shard(task.source, task.output.parent)}
        return write_tar_scores(task, table, len(samples) + len(index.skipped), skipped, recipe, {})

    def _look(self, pair: RawPair) -> _Looked:
        text, reason = self._index.match_text(pair.caption), None
        image = Match(0.0, -1)
        try:
            image = self._index.match_image(decode_image(pair.image, DECODED_SIZE))
        except SampleError as error:
            reason = error.reason
        return _Looked(image, text, reason)

    def _named(self, match: Match | None) -> str | None:
        if match is None or match.entry < 0:
            return None
        name, entry = self._index.names[match.entry]
        return f"{name}, {entry}, distance {1 - match.similarity:.3f}"
