"""The step `score`: from a tar to its score file.

    tar ─ tars.py: index ─ pairs.py: threads read and `prepare` ─► batches ─ `score` ─► OUTPUT/NAME/TAR.parquet
                                                                     (one is scored while the next is collected)

A batch holds consecutive samples that can be used, whatever the number of threads, so that the same tar gives the same
file. What a scorer is stands in `Scorer`; which there are, in kinds.py.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from ...files import describe_shard, remove_temporaries
from ..engine.engine import Outcome, ShardTask
from .embeddings import embeddings_file, write_embeddings
from .pairs import Pair, PreparedSample, RawPair, decode_pair, read_tar
from .score_files import DETAIL, score_table, write_scores

__all__ = ["Pair", "Scorer", "TarScorer", "find_device", "value_names"]


class Scorer(Protocol):
    """Gives each pair one or several values. To be subclassed: what is not needed has a default."""

    parts: tuple[str, ...]  # names of its values; `("",)` for a single one that is called as the scorer is
    model: str  # for the column `model`
    recipe: dict[str, Any]  # what its values depend on beyond the options that it was made with; json-able
    batch_size: int  # pairs that are scored together
    missing_reason: str = "nan_score"  # the reason written where `score` returned NaN
    embeddings: int = 0  # numbers of an image's and of a text's embedding that `score` gives behind the values
    detail: Callable[[Any], str] | None = None  # of a scorer of one value: what of an item is written beside it

    def prepare(self, pair: RawPair) -> Any:
        """Make an item of a pair, or a [`SampleError`]; in several threads; by default a decoded [`Pair`]."""
        return decode_pair(pair)

    def collate(self, items: list[Any]) -> Any:
        """Join items, in one thread, while the batch before is scored; by default the list."""
        return items

    def score(self, batch: Any) -> np.ndarray:
        """Float64 `(items, parts)`, NaN for no value; one batch at a time, in a thread beside `collate`'s."""
        ...


class TarScorer:
    """Scores one tar after the other, or one part of a file of conversations, for one worker of the engine.

    `read` gives the samples of a task, prepared by so many threads, and what of it is no sample: [`read_tar`], or of
    conversations a [`ConversationReader`].
    """

    def __init__(
        self,
        make_scorer: Callable[[], Scorer],
        name: str,
        recipe: dict[str, Any],
        num_threads: int,
        read: Callable[..., AbstractContextManager] = read_tar,
    ):
        self._scorer = make_scorer()
        self._labels = value_names(name, self._scorer.parts)
        self._recipe = recipe
        self._num_threads, self._read = num_threads, read

    def __call__(self, task: ShardTask) -> Outcome:
        """Score a tar."""
        recipe, scorer = {**self._recipe, "source": describe_source(task)}, self._scorer
        ahead = 2 * scorer.batch_size + self._num_threads
        with self._read(task, scorer.prepare, self._num_threads, ahead) as (found, damage):
            samples, scored = self._score(found)
        parts = len(self._labels)
        keys, uids, details, reasons = zip(*samples, strict=True) if samples else ((),) * 4
        values = scored[:, :parts]
        if scorer.embeddings:
            self._write_embeddings(task, uids, scored, recipe)
        table = score_table(self._labels, scorer.model, keys, uids, values, reasons, scorer.missing_reason)
        if scorer.detail is not None:
            table = table.append_column(DETAIL, pa.array(details, pa.string()))
        skipped = list(damage)
        for sample, whole in zip(samples, np.isfinite(values).all(axis=1), strict=True):
            if not whole:
                skipped.append((sample.key, sample.reason or scorer.missing_reason))
        total = len(samples) + len(damage)
        return write_tar_scores(task, table, total, skipped, recipe, scorer.recipe)

    def _score(self, found: Iterable[PreparedSample]) -> tuple[list[PreparedSample], np.ndarray]:
        """The samples, their details in place of their items, and what is scored of each; NaN where nothing is."""
        samples: list[PreparedSample] = []
        batches: list[tuple[list[int], np.ndarray]] = []
        with ThreadPoolExecutor(1) as runner:
            waiting: tuple = ()
            for rows, batch in self._batches(found, samples):
                following = rows, runner.submit(self._scorer.score, batch)
                batches += [(waiting[0], waiting[1].result())] if waiting else []
                waiting = following
            batches += [(waiting[0], waiting[1].result())] if waiting else []
        scored = np.full((len(samples), len(self._labels) + 2 * self._scorer.embeddings), np.nan)
        for rows, own in batches:
            scored[rows] = own
        return samples, scored

    def _write_embeddings(
        self, task: ShardTask, uids: Sequence[str], scored: np.ndarray, recipe: dict[str, Any]
    ) -> None:
        """Before the scores, whose file marks the tar as done."""
        whole = np.flatnonzero(np.isfinite(scored).all(axis=1))
        image, text = np.split(scored[whole, len(self._labels) :], 2, axis=1)
        named = [uids[row] for row in whole]
        path = embeddings_file(task.output)
        remove_temporaries([path])
        made = {"recipe": recipe, "made_with": self._scorer.recipe}
        write_embeddings(path, named, image, text, self._scorer.model, made)

    def _batches(self, found: Iterable[PreparedSample], seen: list[PreparedSample]) -> Iterator[tuple[list[int], Any]]:
        """Rows and content of each batch; every sample is added to `seen`, with its detail in place of its item."""
        rows, items, detail = [], [], self._scorer.detail
        for sample in found:
            if sample.reason is None:
                rows.append(len(seen))
                items.append(sample.item)
            seen.append(sample._replace(item=detail(sample.item) if detail and sample.reason is None else None))
            if len(rows) == self._scorer.batch_size:
                yield rows, self._scorer.collate(items)
                rows, items = [], []
        if rows:
            yield rows, self._scorer.collate(items)


def describe_source(task: ShardTask) -> dict[str, Any]:
    """What a score file remembers of its source: the file, and the range of records where there is one."""
    described = describe_shard(task.source, task.output.parent)
    return {**described, "range": list(task.range)} if getattr(task, "range", None) else described


def write_tar_scores(
    task: ShardTask,
    table: pa.Table,
    samples: int,
    skipped: Sequence[tuple[str, str]],
    recipe: dict[str, Any],
    made_with: dict[str, Any],
) -> Outcome:
    """Write a shard's score file with its counts; `recipe` is what a rerun compares, `made_with` what else decides."""
    outcome = Outcome.of(samples, [(str(task.source), key, reason) for key, reason in skipped])
    counts = {"samples": samples, "skipped": outcome.skipped}
    write_scores(task.output, table, {"recipe": recipe, "made_with": made_with, **counts})
    return outcome


def value_names(name: str, parts: Sequence[str]) -> list[str]:
    """What the values of a scorer are called in the column `scorer`; an empty part adds nothing to its name."""
    return [f"{name}.{part}" if part else name for part in parts]


def find_device(device: str | None) -> torch.device:
    """Where a worker's model runs: as torch names it, else the worker's GPU, or the CPU."""
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
