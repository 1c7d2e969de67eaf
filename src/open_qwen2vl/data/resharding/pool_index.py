"""Reshard's first step: of each tar of the pool the samples that are in the subset, and where their bytes are.

One file per tar in the working folder, a task of the engine each. `Layout` joins them in the order in which they are
written: every uid once, the first in the order of the pool.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...files import renamed_when_whole
from ...places import Place, arrow_source, open_file
from ...transfers import local_copy
from ..engine.engine import Outcome, ShardTask, collection_paused
from ..storage.open_files import map_array
from ..storage.tars import Sample, has_bad_uid, index_shard, read_json, sample_uid
from ..storage.uids import find_uids, parse_uids, read_uids
from .new_captions import NewCaptions

SHUFFLE_WINDOW = 32  # tars
_METADATA_KEY = b"open_qwen2vl"
_NUMBERS = pa.list_(pa.int64())
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("place", pa.int64()),  # of its uid in the subset
        ("span_start", _NUMBERS),  # bytes of the tar that are copied
        ("span_end", _NUMBERS),
        ("ext", pa.list_(pa.string())),
        ("offset", _NUMBERS),  # of each member's data in the tar
        ("size", _NUMBERS),
        ("drawn", pa.bool_()),  # whether a new caption is wanted
        ("caption", pa.string()),  # that caption; null where the sample keeps its own
    ]
)


class PoolIndexer:
    """Indexes one tar after the other; `subset` is the file of the uids that are wanted."""

    def __init__(self, subset: str, captions: NewCaptions | None = None):
        self._subset, self._captions = read_uids(subset), captions

    @collection_paused()
    def __call__(self, task: ShardTask) -> Outcome:
        """Index a tar, of a bucket from a copy: its headers and json lie all over it."""
        with local_copy(task.source) as tar:
            return self._index(task, tar)

    def _index(self, task: ShardTask, tar: Path) -> Outcome:
        index = index_shard(tar)
        samples, uids, skipped, unnamed = [], [], list(index.skipped), []
        with open_file(tar) as file:
            for sample in index.samples:
                metadata = read_json(file, sample)
                if not sample.members or has_bad_uid(metadata):
                    skipped.append((sample.key, "bad_uid" if sample.members else "missing_image"))
                    continue
                samples.append(sample)
                uids.append(sample_uid(metadata, task.source.name, sample.key))
                unnamed.append(not isinstance(metadata, dict) or metadata.get("uid") is None)
        places = find_uids(self._subset, *parse_uids(uids))
        chosen = np.flatnonzero(places >= 0)
        total = len(index.samples) + len(index.skipped)
        figures = {
            "samples": total,
            "skipped": dict(Counter(reason for _, reason in skipped)),
            "ignored_members": index.ignored_members,
            "unnamed": int(np.array(unnamed, bool)[chosen].sum()),
        }
        new: tuple[Sequence[Any], Sequence[Any]] = ([None] * len(chosen), [None] * len(chosen))
        if self._captions is not None:
            new = self._captions.of(task.source, [uids[i] for i in chosen])
        table = _table([samples[i] for i in chosen], places[chosen], *new)
        with renamed_when_whole(task.output) as temporary:
            metadata = {_METADATA_KEY: json.dumps(figures, sort_keys=True)}
            pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")
        return Outcome.of(total, [(str(task.source), key, reason) for key, reason in skipped])


def read_figures(path: Place) -> dict[str, Any]:
    """What a [`PoolIndexer`] found: samples, skipped by reason, ignored_members, unnamed (chosen, without a uid)."""
    return json.loads(pq.read_schema(arrow_source(path)).metadata[_METADATA_KEY])


class Layout:
    """Which samples of the pool are written in which order.

    With a seed the tars of the pool are shuffled, then the samples of every `SHUFFLE_WINDOW` tars among each other.
    """

    def __init__(self, folder: Place, seed: int | None = None):
        self._seed = seed
        self._rows = map_array(folder / "rows.npy")
        self._starts = np.array(map_array(folder / "starts.npy"))
        tars, self._window = len(self._starts) - 1, 1 if seed is None else SHUFFLE_WINDOW
        self._order = np.arange(tars) if seed is None else np.random.default_rng(seed).permutation(tars)
        counts = np.diff(self._starts)[self._order]
        self._window_starts = np.append(np.concatenate([[0], counts.cumsum()])[: -1 : self._window], counts.sum())
        self.total = len(self._rows)

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tar and row in the tar's index of the samples of a part of the order: int64 `(samples,)` each."""
        first = np.searchsorted(self._window_starts, start, "right") - 1
        last = np.searchsorted(self._window_starts, min(stop, self.total), "left")
        parts = [self._window_samples(window) for window in range(first, last)]
        begin = start - self._window_starts[first]
        tars, rows = (np.concatenate(column)[begin : begin + stop - start] for column in zip(*parts, strict=True))
        return tars, rows

    def _window_samples(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        tars = self._order[window * self._window : (window + 1) * self._window]
        rows = [self._rows[self._starts[tar] : self._starts[tar + 1]].astype(np.int64) for tar in tars]
        columns = np.repeat(tars, [len(own) for own in rows]), np.concatenate(rows)
        if self._seed is None:
            return columns
        order = np.random.default_rng([self._seed, window]).permutation(len(columns[0]))
        return columns[0][order], columns[1][order]


def write_layout(folder: Place, indexes: list[Place], uids: int) -> tuple[np.ndarray, int]:
    """Choose among samples with the same uid, and write what [`Layout`] reads.

    Returns which uids of the subset are in the pool, bool `(uids,)`, and how many samples came with a uid again.
    """
    seen, duplicates = np.zeros(uids, bool), 0
    chosen = []
    for path in indexes:
        places = pq.read_table(arrow_source(path), columns=["place"])["place"].to_numpy()
        first = np.unique(places, return_index=True)[1]
        rows = np.sort(first[~seen[places[first]]])
        seen[places[rows]] = True
        duplicates += len(places) - len(rows)
        chosen.append(rows.astype(np.uint32))
    for name, array in (
        ("starts.npy", np.cumsum([0, *map(len, chosen)])),
        ("rows.npy", np.concatenate([np.empty(0, np.uint32), *chosen])),
    ):
        with renamed_when_whole(folder / name) as temporary, open(temporary, "wb") as file:
            np.save(file, array)
    return seen, duplicates


def count_captions(folder: Place, indexes: list[Place]) -> tuple[int, int]:
    """Samples of the layout that get a new caption, and those that were drawn and have none."""
    rows, starts = map_array(folder / "rows.npy"), map_array(folder / "starts.npy")
    drawn = new = 0
    for tar, path in enumerate(indexes):
        table = pq.read_table(arrow_source(path), columns=["drawn", "caption"])
        table = table.take(rows[starts[tar] : starts[tar + 1]])
        drawn += pc.sum(table["drawn"]).as_py() or 0
        new += len(table) - table["caption"].null_count
    return new, drawn - new


def _table(
    samples: list[Sample], places: np.ndarray, drawn: Sequence[bool | None], captions: Sequence[str | None]
) -> pa.Table:
    columns: dict[str, list] = {name: [] for name in _SCHEMA.names}
    for sample in samples:
        starts, ends = zip(*sample.spans, strict=True)
        columns["span_start"].append(starts)
        columns["span_end"].append(ends)
        offsets, sizes = zip(*sample.members.values(), strict=True)
        columns["ext"].append(list(sample.members))
        columns["offset"].append(offsets)
        columns["size"].append(sizes)
    columns |= {"key": [sample.key for sample in samples], "place": places, "drawn": drawn, "caption": captions}
    return pa.table(columns, _SCHEMA)
