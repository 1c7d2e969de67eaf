"""Sampling towards the task types of a reference set: `--like SCORES --sample N`.

    reference's embeddings ─ faiss: k-means ─► types and their shares ┐
    candidates' embeddings ─ nearest type ────────────────────────────┴► of each type its share of N, drawn by uid

A type is a cluster of pictures and questions (of captions, in pairs). Of one with too few candidates all stay, and the
others do not make up for it: the shares of what is there stay right, and the report says how many are wanting.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...places import Place, arrow_source
from ..scoring.embeddings import embeddings_of, read_embeddings
from ..scoring.score_files import DETAIL, find_score_files
from .semantic import candidate_uids, embedding_files, gather_vectors, load_faiss, unit_vectors

if TYPE_CHECKING:
    import duckdb

TYPES = 50  # by default
MOST_REFERENCES = 1 << 20  # vectors of the reference that are held
_LEAST = 4  # vectors a type, on average
_TRAINED_ON, _ITERATIONS, _TRIES = 1024, 20, 5  # vectors a type; of k-means, which may end badly
_BLOCK = 1 << 14
_NO_TYPE = -1  # of candidates without an embedding
_SHOWN = 160  # characters of an example


class TaskType(NamedTuple):
    """A type, and how much of it there is."""

    example: str  # the reference's text nearest to its middle; empty where the scores have none
    reference: int  # of the reference
    before: int  # candidates
    wanted: int  # its share of `--sample`
    after: int  # drawn


class Matching(NamedTuple):
    """What a sampling towards a reference came to."""

    types: list[TaskType]  # the commonest of the reference first
    without: int  # candidates without an embedding, none of which is drawn

    def distance(self, before: bool) -> float:
        """Total variation between the candidates', or the drawn ones', and the reference: 0 the same, 1 disjoint."""
        own = np.array([one.before if before else one.after for one in self.types], float)
        like = np.array([one.reference for one in self.types], float)
        return float(np.abs(own / max(1, own.sum()) - like / max(1, like.sum())).sum() / 2)


def draw_like(
    connection: "duckdb.DuckDBPyConnection",
    score_files: Sequence[Place],
    like: Sequence[str | Place],
    wanted: int,
    types: int,
    seed: int,
    work: Path,
    threads: int | None,
) -> Matching:
    """Make the table `undrawn` (uid, type) from `candidates` and `duplicates`: what is not drawn.

    A `ValueError` for scores without embeddings, or of two models.
    """
    files = embedding_files(score_files, "--like")
    reference_scores = find_score_files(like)
    references = embedding_files(reference_scores, "--like")
    if embeddings_of(references[0]) != embeddings_of(files[0]):
        raise ValueError(f"{references[0]}: embeddings of another model than {files[0]}")
    faiss = load_faiss(threads, "--like")
    reference, names = _reference_vectors(references)
    centres, shares, nearest = _types(faiss, reference, types)
    connection.execute("CREATE TABLE remaining AS SELECT uid FROM candidates ANTI JOIN duplicates USING (uid)")
    uids = candidate_uids(connection, "remaining")
    connection.execute("DROP TABLE remaining")
    vectors, there = gather_vectors(files, uids, work / "matched.f16", True)
    labels = np.full(len(uids), _NO_TYPE)
    rows = np.flatnonzero(there)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        labels[block] = centres.search(unit_vectors(vectors[block]), 1)[1][:, 0]
    goals = _apportion(shares, wanted)
    _draw(connection, uids, labels, goals, seed)
    texts = _texts(reference_scores, {names[row] for row in nearest})
    counts = np.bincount(labels[labels >= 0], minlength=len(goals))
    found = [
        TaskType(texts.get(names[row], ""), reference, before, goal, min(before, goal))
        for row, reference, before, goal in zip(nearest, shares.tolist(), counts.tolist(), goals.tolist(), strict=True)
    ]
    return Matching(found, int((labels == _NO_TYPE).sum()))


def _reference_vectors(files: Sequence[Place]) -> tuple[np.ndarray, list[str]]:
    """Float32 of unit length `(n, numbers)`, and the uids."""
    parts, names = [np.empty((0, 2 * embeddings_of(files[0])[1]), np.float32)], []
    for file in files:
        for uids, vectors in read_embeddings(file, True):
            parts.append(np.float32(vectors))
            names += uids
            if len(names) > MOST_REFERENCES:
                raise ValueError(f"--like: more than {MOST_REFERENCES:,} samples; a part of them tells as much")
    if not names:
        raise ValueError(f"--like: no embedding in {files[0].parent}")
    return np.concatenate(parts), names


def _types(faiss: Any, reference: np.ndarray, types: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """An index of the types' middles, the reference's number of each (the commonest first), and the nearest row."""
    count = max(1, min(types, len(reference) // _LEAST))
    kmeans = faiss.Kmeans(
        reference.shape[1], count, niter=_ITERATIONS, nredo=_TRIES, seed=0, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=_TRAINED_ON,
    )  # fmt: skip
    kmeans.train(reference)
    labels = kmeans.index.search(reference, 1)[1][:, 0]
    counts = np.bincount(labels, minlength=count)
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    index = faiss.IndexFlatIP(reference.shape[1])
    index.add(np.ascontiguousarray(kmeans.centroids[order]))
    examples = faiss.IndexFlatIP(reference.shape[1])
    examples.add(reference)
    nearest = examples.search(np.ascontiguousarray(kmeans.centroids[order]), 1)[1][:, 0]
    # Counted again: rounding may put what lies between two middles to the other one.
    labels = index.search(reference, 1)[1][:, 0]
    return index, np.bincount(labels, minlength=len(order)), nearest


def _apportion(shares: np.ndarray, wanted: int) -> np.ndarray:
    """A whole number for each share, `wanted` in all, by the largest remainders."""
    exact = shares * (wanted / shares.sum())
    goals = np.floor(exact).astype(np.int64)
    more = np.argsort(goals - exact, kind="stable")[: wanted - goals.sum()]
    goals[more] += 1
    return goals


def _draw(
    connection: "duckdb.DuckDBPyConnection", uids: np.ndarray, labels: np.ndarray, goals: np.ndarray, seed: int
) -> None:
    """Make the table `undrawn`: of each type all but those with the smallest numbers, which uid and seed give."""
    halves = {name: np.ascontiguousarray(uids[field]) for name, field in (("high", "f0"), ("low", "f1"))}
    typed = connection.from_arrow(pa.table({**halves, "type": labels.astype(np.int32)}))
    typed.project("((high::UHUGEINT << 64) | low::UHUGEINT)::UUID AS uid, type").create("typed")
    connection.from_arrow(pa.table({"type": np.arange(len(goals), dtype=np.int32), "goal": goals})).create("goals")
    connection.execute(
        """
        CREATE TABLE undrawn AS SELECT uid, type FROM (
            SELECT *, row_number() OVER (
                PARTITION BY type ORDER BY md5_number_lower($seed || replace(uid::VARCHAR, '-', '')), uid
            ) AS place FROM typed
        ) LEFT JOIN goals USING (type) WHERE place > coalesce(goal, 0)
        """,
        {"seed": f"{seed}:like:"},
    )
    connection.execute("DROP TABLE typed")
    connection.execute("DROP TABLE goals")


def _texts(score_files: Sequence[Place], uids: set[str]) -> dict[str, str]:
    """What the scores say beside the value of some uids, as the questions of a conversation."""
    texts: dict[str, str] = {}
    for file in score_files:
        if DETAIL.name in pq.read_schema(arrow_source(file)).names:
            table = pq.read_table(
                arrow_source(file), columns=["uid", DETAIL.name], filters=[("uid", "in", sorted(uids))]
            )
            found = zip(table["uid"].to_pylist(), table[DETAIL.name].to_pylist(), strict=True)
            texts |= {uid: text[:_SHOWN] for uid, text in found if text}
    return texts
