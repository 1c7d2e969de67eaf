"""Pairs that show the same thing: SemDeDup (arXiv 2303.09540) over the embeddings that `score` has kept.

    embeddings/*.parquet ─► vectors on the disk, a row for each candidate in the order of the uids ─ faiss: k-means
        a cluster ─ in the order of the uids: like one that stays? it goes; else it stays ─► duplicates (uid, keeper)

A thousand copies so cost a thousand comparisons. What stays is then compared with what stays in the three clusters
next to it. Pairs that are alike and lie further apart are not seen; `benchmarks/curation.py` counts them. The same
machine gives the same result.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ...places import Place
from ..scoring.embeddings import check_embeddings, embeddings_file, embeddings_of, keeps_embeddings, read_embeddings
from ..scoring.score_files import RECORDS_OF, read_score_metadata
from ..storage.uids import UID_DTYPE, find_uids, parse_uids

if TYPE_CHECKING:
    import duckdb

_IN_A_CLUSTER = 1000  # vectors, about
_TRAINED_ON, _ITERATIONS = 64, 10  # vectors a cluster; of k-means
_CLUSTERS_COMPARED = 4  # with each vector: its own and the next
_BLOCK = 1024  # vectors that are compared at a time
_MOST_SIMILARITY = 1 - 1e-4  # equal images reach it, whatever batch they were in: below 1 by 16 bits and kernels


def find_semantic_duplicates(
    connection: "duckdb.DuckDBPyConnection",
    score_files: Sequence[Place],
    work: Path,
    similarity: float,
    joint: bool,
    memory: int,
    threads: int | None,
) -> int:
    """Make the table `duplicates` (uid, keeper) from the table `candidates` (uid), as [`find_duplicates`] does.

    `memory` are the bytes for vectors that are held at a time. Returns the number of candidates without an embedding.
    """
    files = embedding_files(score_files)
    if not joint and any(read_score_metadata(file).get("recipe", {}).get(RECORDS_OF) for file in score_files):
        raise ValueError(
            "--deduplicate semantic of conversations needs --joint: several of them may be about one picture"
        )
    uids = candidate_uids(connection)
    vectors, there = gather_vectors(files, uids, work / "vectors.f16", joint)
    ranks = np.flatnonzero(there)
    keepers = semantic_keepers(vectors, ranks, similarity, memory, threads)
    gone = np.flatnonzero(keepers >= 0)
    connection.execute("CREATE TABLE duplicates (uid UUID, keeper UUID)")
    halves = {}
    for name, rows in (("uid", uids[ranks[gone]]), ("keeper", uids[ranks[keepers[gone]]])):
        halves |= {f"{name}_{field}": np.ascontiguousarray(rows[field]) for field in ("f0", "f1")}
    columns = ", ".join(f"(({n}_f0::UHUGEINT << 64) | {n}_f1::UHUGEINT)::UUID" for n in ("uid", "keeper"))
    connection.from_arrow(pa.table(halves)).project(columns).insert_into("duplicates")
    return len(uids) - len(ranks)


def semantic_keepers(
    vectors: np.ndarray, ranks: np.ndarray, similarity: float, memory: int, threads: int | None
) -> np.ndarray:
    """For each of some rows the position, among `ranks`, of that which stays in its place; -1 of those that stay.

    `vectors` are of unit length but for their 16 bits, `(rows, numbers)`; a similarity above 0.9999 counts as that;
    `ranks`, int64 `(n,)`, are the compared ones, in their order.
    """
    faiss, similarity = load_faiss(threads), min(similarity, _MOST_SIMILARITY)
    keepers = np.full(len(ranks), -1)
    clusters = _clusters(faiss, vectors, ranks, memory)
    for members in _members(clusters[:, 0], np.arange(len(ranks))):
        index, staying = faiss.IndexFlatIP(vectors.shape[1]), np.empty(0, np.int64)
        for first in range(0, len(members), _BLOCK):
            block = members[first : first + _BLOCK]
            stays = _compare(index, staying, block, unit_vectors(vectors[ranks[block]]), similarity, keepers)
            staying = np.concatenate([staying, stays])
    _compare_neighbours(faiss, vectors, ranks, clusters, similarity, keepers)
    return keepers


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Float32 of unit length again, which rounding to 16 bits took away."""
    rows = np.float32(vectors)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _members(labels: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of each label, which `labels` has of each of them, in their order."""
    order = np.argsort(labels, kind="stable")
    edges = np.flatnonzero(np.diff(labels[order], prepend=-1, append=-1))
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        yield rows[order[start:stop]]


def _compare_neighbours(
    faiss: Any, vectors: np.ndarray, ranks: np.ndarray, clusters: np.ndarray, similarity: float, keepers: np.ndarray
) -> None:
    """What still stays is compared with what stays in the next clusters: pairs may be alike across a border."""
    staying = np.flatnonzero(keepers < 0)
    owned = {int(clusters[rows[0], 0]): rows for rows in _members(clusters[staying, 0], staying)}
    pairs = [np.empty((0, 2), np.int64)]
    for column in range(1, clusters.shape[1]):
        for visitors in _members(clusters[staying, column], staying):
            members = owned.get(int(clusters[visitors[0], column]))
            if members is None:
                continue
            index = faiss.IndexFlatIP(vectors.shape[1])
            index.add(unit_vectors(vectors[ranks[members]]))
            for first in range(0, len(visitors), _BLOCK):
                block = visitors[first : first + _BLOCK]
                cosines, nearest = index.search(unit_vectors(vectors[ranks[block]]), 1)
                like = cosines[:, 0] >= similarity
                pairs.append(np.sort(np.stack([block[like], members[nearest[like, 0]]], axis=1)))
    for earlier, later in np.unique(np.concatenate(pairs)[:, ::-1], axis=0)[:, ::-1].tolist():
        if keepers[earlier] < 0 and keepers[later] < 0:
            keepers[later] = earlier
    gone = np.flatnonzero(keepers >= 0)
    moved = gone[keepers[keepers[gone]] >= 0]  # what they went for has gone itself
    keepers[moved] = keepers[keepers[moved]]


def _compare(
    index: Any, staying: np.ndarray, block: np.ndarray, vectors: np.ndarray, similarity: float, keepers: np.ndarray
) -> np.ndarray:
    """Fill in the keepers of a block; its rows that stay join the index, which holds `staying`, and are returned."""
    if index.ntotal:
        cosines, nearest = index.search(vectors, 1)
        like = cosines[:, 0] >= similarity
        keepers[block[like]] = staying[nearest[like, 0]]
    within = vectors @ vectors.T >= similarity
    for row in np.flatnonzero((within.sum(axis=1) > 1) & (keepers[block] < 0)):
        if keepers[block[row]] < 0:
            later = np.flatnonzero(within[row, row + 1 :]) + row + 1
            later = later[keepers[block[later]] < 0]
            keepers[block[later]] = block[row]
    stays = np.flatnonzero(keepers[block] < 0)
    index.add(np.ascontiguousarray(vectors[stays]))
    return block[stays]


def _clusters(faiss: Any, vectors: np.ndarray, ranks: np.ndarray, memory: int) -> np.ndarray:
    """The nearest clusters of each row, its own first: int32 `(n, up to 4)`."""
    size = vectors.shape[1]
    held = max(_BLOCK, memory // (4 * size))  # vectors
    count = min(max(1, len(ranks) // _IN_A_CLUSTER), max(1, held // _TRAINED_ON))
    if count == 1:
        return np.zeros((len(ranks), 1), np.int32)
    sample = ranks[np.unique(np.linspace(0, len(ranks) - 1, min(len(ranks), _TRAINED_ON * count)).astype(np.int64))]
    kmeans = faiss.Kmeans(
        size, count, niter=_ITERATIONS, seed=0, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=_TRAINED_ON,
    )  # fmt: skip
    kmeans.train(np.float32(vectors[sample]))
    labels = np.empty((len(ranks), min(count, _CLUSTERS_COMPARED)), np.int32)
    step = min(held, 1 << 16)
    for start in range(0, len(ranks), step):
        block = np.float32(vectors[ranks[start : start + step]])
        _, labels[start : start + step] = kmeans.index.search(block, labels.shape[1])
    return labels


def embedding_files(score_files: Sequence[Place], option: str = "--deduplicate semantic") -> list[Place]:
    """The files beside score files, all of one model; a `ValueError` where there are none."""
    scored = [file for file in score_files if keeps_embeddings(file)]
    if not scored:
        raise ValueError(f"{option} needs embeddings: run open-qwen2vl score with --keep-embeddings")
    for file in scored:
        check_embeddings(file)
    files = [embeddings_file(file) for file in scored]
    first = embeddings_of(files[0])
    for file in files:
        if (found := embeddings_of(file)) != first:
            raise ValueError(
                f"{file}: embeddings of {found[0]} ({found[1]} numbers), others are of {first[0]} ({first[1]}): "
                "give the scores of one model only"
            )
    return files


def candidate_uids(connection: "duckdb.DuckDBPyConnection", table: str = "candidates") -> np.ndarray:
    """The uids of a table, sorted: `UID_DTYPE` `(n,)`."""
    rows = connection.sql(
        f"SELECT (uid::UHUGEINT >> 64)::UBIGINT AS high, (uid::UHUGEINT & {2**64 - 1})::UBIGINT AS low "
        f"FROM (SELECT uid FROM {table} ORDER BY uid)"
    ).to_arrow_table()
    uids = np.empty(len(rows), UID_DTYPE)
    uids["f0"], uids["f1"] = rows["high"].to_numpy(), rows["low"].to_numpy()
    return uids


def gather_vectors(files: Sequence[Place], uids: np.ndarray, path: Path, joint: bool) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of candidates as float16 `(candidates, numbers)`, mapped, and which of them are there, bool."""
    size = embeddings_of(files[0])[1] * (1 + joint)
    vectors = np.memmap(path, np.float16, "w+", shape=(max(1, len(uids)), size))
    there = np.zeros(len(uids), bool)
    for file in files:
        for names, rows in read_embeddings(file, joint):
            found = find_uids(uids, *parse_uids(names))
            wanted = np.flatnonzero(found >= 0)
            wanted = wanted[~there[found[wanted]]]  # of a uid that stands in two tars the first
            vectors[found[wanted]] = rows[wanted]
            there[found[wanted]] = True
    return vectors, there


def load_faiss(threads: int | None, option: str = "--deduplicate semantic") -> Any:
    """The library; a `ValueError` where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError(f'{option} needs faiss: pip install "open-qwen2vl[curate]"') from error
    if threads is not None:
        faiss.omp_set_num_threads(threads)
    return faiss
