"""The step: an index of the evaluation sets, its self-test, then a score file for each shard of the pool."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from ..data.engine.engine import Outcome, ShardTask, run_tasks
from ..data.scoring.conversations import RawConversation
from ..data.scoring.kinds import check_finished, describe_pool, indexed_images, open_pool
from ..data.scoring.pairs import RawPair
from ..data.scoring.score_files import DETAIL, score_table
from ..data.scoring.scoring import describe_source, value_names, write_tar_scores
from ..output_lock import only_writer
from ..places import is_remote, place
from ..processing.images import decode_image, to_rgb
from ..processing.sample_error import SampleError
from .attacks import AttackCounts, clean_alarms, self_test
from .embeddings import EmbeddedSets, KeptEmbeddings, embed_sets, find_kept, load_embedder
from .index import ALGORITHM, DECODED_SIZE, ContaminationIndex, Match, build_index
from .options import DecontaminateOptions
from .report import DecontaminationReport, count_found, write_report
from .sets import EvaluationSet, fetch_sets, find_sets, readable_entries
from .views import PLAIN

NAME = "contaminated"
_NOTHING = Match(0.0, -1)


class _Looked(NamedTuple):
    """What a sample is like."""

    images: int
    image: Match
    text: Match
    reason: str | None  # why a picture of it cannot be compared


def decontaminate(options: DecontaminateOptions) -> DecontaminationReport:
    """Look for evaluation pictures and texts in a pool; a rerun makes what is missing.

    Args:
        options ([`DecontaminateOptions`]): what is looked for, and where.

    Returns:
        [`DecontaminationReport`]: how well changed pictures are found, and what was found.

    Raises:
        ValueError: for a set of no known form, scores that were made against other sets, or embeddings of several
            models or of another one.
        OSError: if a file cannot be read or written.
    """
    folder = place(options.output) / NAME
    if is_remote(folder) and options.engine == "ray":
        raise ValueError(f"--engine ray: the index of the sets is a mapped file, which {options.output} cannot hold")
    pool = open_pool(options.pool, options.images, folder)
    kept = find_kept(options.embeddings, pool.tasks) if options.embeddings else None
    with only_writer(folder), tempfile.TemporaryDirectory(prefix="open-qwen2vl-") as scratch:
        sets = fetch_sets(find_sets(options.against), Path(scratch))
        # What is mapped lies on this machine: a remote output has no index, each run makes it.
        work = Path(scratch) / ".index" if is_remote(folder) else Path(folder)
        made = build_index(work / "against", sets)
        recipe = {"scorer": "decontaminate", "name": NAME, "algorithm": ALGORITHM}
        recipe["options"] = {"against": made["sets"]}
        recipe["options"] |= {"embeddings": kept.name} if kept else {}
        describe_pool(recipe, pool)
        check_finished(pool.tasks, recipe)
        index = ContaminationIndex(work / "against")
        samples = _sample_pictures(index, sets, options.self_test)
        attacks, alarms = self_test(index.like, samples), clean_alarms(index.like, samples)
        embedded = _embed(work / "embedded", sets, kept, samples) if kept else []
        with indexed_images(folder, pool.roots):
            step = run_tasks(
                pool.tasks,
                functools.partial(PoolChecker, work, recipe, pool.read, kept),
                engine=options.engine,
                num_workers=options.num_workers,
                description="looking for evaluation samples",
            )
        report = DecontaminationReport(
            step=step,
            contents=made["contents"],
            texts_left_out=made["texts_left_out"],
            attacks=attacks,
            embedded=embedded,
            compared=len(samples),
            alike=[(index.names[entry], index.names[other]) for entry, other in alarms],
            found=count_found([task.output for task in pool.tasks]),
        )
        write_report(folder, report)
    return report


def _sample_pictures(
    index: ContaminationIndex, sets: Sequence[EvaluationSet], count: int
) -> list[tuple[int, Image.Image]]:
    """Number and picture of `count` entries, evenly spread; the sets are read again for them."""
    entries = np.unique(index.owners)
    chosen = set(entries[np.unique(np.linspace(0, len(entries) - 1, min(count, len(entries))).astype(int))].tolist())
    found = []
    for number, entry in readable_entries(sets) if chosen else ():
        if number in chosen:
            with contextlib.suppress(SampleError):  # the entry has another picture that can be compared
                image = entry.images[0]
                image = decode_image(image) if isinstance(image, bytes) else to_rgb(image)
                index.similarities(image)
                found.append((number, image))
    return found


def _embed(
    folder: Path, sets: Sequence[EvaluationSet], kept: KeptEmbeddings, samples: list[tuple[int, Image.Image]]
) -> list[AttackCounts]:
    """Write the embeddings of the sets; what is found by them of changed pictures."""
    embedder = load_embedder(kept)
    embed_sets(folder, sets, kept, embedder)
    index = EmbeddedSets(folder)
    return self_test(lambda image: index.like(embedder.embed_images([image])[0]), samples)


class PoolChecker:
    """Looks through one shard after the other, for one worker of the engine."""

    def __init__(
        self, folder: Path, recipe: dict[str, Any], read: Callable[..., Any], kept: KeptEmbeddings | None = None
    ):
        self._index = ContaminationIndex(folder / "against")
        self._embedded = EmbeddedSets(folder / "embedded") if kept else None
        self._recipe, self._read, self._kept = recipe, read, kept
        self._labels = value_names(NAME, ("image", "text", "embedding") if kept else ("image", "text"))

    def __call__(self, task: ShardTask) -> Outcome:
        """Compare the samples of a shard."""
        with self._read(task, self._look) as (found, damage):
            samples = list(found)
        keys, uids, looked, reasons = zip(*samples, strict=True) if samples else ((),) * 4
        values = np.full((len(samples), len(self._labels)), np.nan)
        details: list[list[str | None]] = [[None] * len(samples) for _ in self._labels]
        skipped, why = list(damage), list(reasons)
        nearest = self._embedded.nearest(self._kept.files[task.output.name]) if self._kept else {}
        for row, (key, uid, one, reason) in enumerate(samples):
            if one is not None:
                reason = why[row] = one.reason
            if reason:
                skipped.append((key, reason))
            matches = [one.image, one.text] if one else [None, None]
            if self._kept:  # what has no picture is like none
                matches.append(nearest.get(uid, _NOTHING if one and not one.images else None))
            for part, match in enumerate(matches):
                # What shows too little to be told from others is in no index either.
                if match is not None and (part > 0 or reason in (None, PLAIN)):
                    values[row, part], details[part][row] = match.similarity, self._named(match)
        table = score_table(self._labels, ALGORITHM, keys, uids, values, why, "no_embedding")
        table = table.append_column(DETAIL, pa.array([text for part in details for text in part], pa.string()))
        recipe = {**self._recipe, "source": describe_source(task)}
        return write_tar_scores(task, table, len(samples) + len(damage), skipped, recipe, {})

    def _look(self, sample: RawPair | RawConversation) -> _Looked:
        """Of a conversation the picture that is most like one counts, and all that is said as one text."""
        if isinstance(sample, RawConversation):
            images, text = sample.images, " ".join(said for _, said in sample.turns)
        else:
            images, text = [sample.image], sample.caption
        best, reason = _NOTHING, None
        for image in images:
            try:
                best = max(best, self._index.match_image(decode_image(image, DECODED_SIZE)), key=lambda one: one[0])
            except SampleError as error:
                # One that cannot be read says more than one that shows too little.
                reason = error.reason if reason in (None, PLAIN) else reason
        return _Looked(len(images), best, self._index.match_text(text), reason)

    def _named(self, match: Match) -> str | None:
        if match.entry < 0:
            return None
        name, entry = self._index.names[match.entry]
        return f"{name}, {entry}, distance {1 - match.similarity:.3f}"
