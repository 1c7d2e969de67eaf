"""Concepts, balance and semantic duplicates: how fast, and what clusters lose against brute force.

Captions are made of the shipped list's names, so that common ones are as common as rank^-1. Vectors are unit vectors
around directions that are drawn at random, which is the hard case for clusters, some with a copy at a cosine of 0.97.
Prints tables and writes them to benchmarks/results/curation.md.

    OMP_NUM_THREADS=2 python benchmarks/curation.py --captions 1000000 --vectors 1000000
"""

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from report import describe_machine, write_result

from open_qwen2vl.data.filtering import FilterOptions, select_pairs
from open_qwen2vl.data.filtering.semantic import semantic_keepers
from open_qwen2vl.data.scoring.concepts import ConceptScorer
from open_qwen2vl.data.scoring.pairs import RawPair
from open_qwen2vl.data.scoring.score_files import DETAIL, score_table, write_scores

SIZE, SIMILARITY, COPIES = 512, 0.95, 0.2


def concepts(count: int) -> list[str]:
    """Captions a second, and a filter with balance over all of them."""
    scorer, random = ConceptScorer(), np.random.default_rng(0)
    shares = 1 / np.arange(1, len(scorer.concepts) + 1)
    drawn = random.choice(len(scorer.concepts), (count, 3), p=shares / shares.sum())
    words = [f"a {scorer.concepts[a]} beside the {scorer.concepts[b]}, and {scorer.concepts[c]}" for a, b, c in drawn]
    started = time.process_time()
    found = [scorer.prepare(RawPair("", "", b"", text)) for text in words]
    matching = time.process_time() - started
    uids = [f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}" for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        table = score_table(["concepts"], "m", uids, uids, scorer.score(found), [None] * count, None)
        table = table.append_column(DETAIL, pa.array(map(scorer.detail, found), pa.string()))
        write_scores(Path(folder) / "scores/concepts/0.parquet", table, {"recipe": {}})
        started = time.process_time()
        keep = f"balance(concepts, {count // 500})"
        report = select_pairs(FilterOptions([f"{folder}/scores"], f"{folder}/subset.npy", keep, threads=1))
        filtering = time.process_time() - started
    (tail,) = report.tails
    head, rare = tail.heads[0], tail.whole
    return [
        "| captions | matched | balance, CPU s | kept | commonest, before and after | rare ones, before and after |",
        "|---:|---:|---:|---:|---:|---:|",
        f"| {count:,} | {count / matching:,.0f} a second | {filtering:.1f} ({keep}) | {report.kept:,} | "
        f"{head[1]:,} {head[2]:,} | {rare[0]:,} {rare[1]:,} |",
    ]


def made_vectors(path: Path, count: int) -> np.ndarray:
    """Unit vectors float16 `(count, 512)` on the disk; of the last `COPIES` each is near one of the first."""
    vectors = np.memmap(path, np.float16, "w+", shape=(count, SIZE))
    random, own = np.random.default_rng(0), int(count * (1 - COPIES))
    topics = random.standard_normal((2000, SIZE)).astype(np.float32)
    for start in range(0, count, 1 << 14):
        rows = np.arange(start, min(count, start + (1 << 14)))
        noise = random.standard_normal((len(rows), SIZE)).astype(np.float32)
        found = topics[random.integers(0, len(topics), len(rows))] + noise
        vectors[rows] = found / np.linalg.norm(found, axis=1, keepdims=True)
    for start in range(own, count, 1 << 14):
        rows = np.arange(start, min(count, start + (1 << 14)))
        found = vectors[rows - own] + 0.25 / SIZE**0.5 * random.standard_normal((len(rows), SIZE))
        vectors[rows] = found / np.linalg.norm(found, axis=1, keepdims=True)
    return vectors


def semantic(count: int, compared: int, memory: int, threads: int | None) -> list[str]:
    """The step's time, and on `compared` vectors what it finds of what brute force finds."""
    table = ["| vectors | wall s | CPU s | go | of brute force's | brute force, CPU s |", "|---:|" + "---:|" * 5]
    with tempfile.TemporaryDirectory() as folder:
        for number in sorted({count, min(count, compared)}):
            vectors, ranks = made_vectors(Path(folder) / f"{number}.f16", number), np.arange(number)
            wall, cpu = time.perf_counter(), time.process_time()
            gone = set(np.flatnonzero(semantic_keepers(vectors, ranks, SIMILARITY, memory, threads) >= 0).tolist())
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            exact = "| | |"
            if number <= compared:
                started = time.process_time()
                all_gone = set(np.flatnonzero(brute(vectors) >= 0).tolist())
                share = len(gone & all_gone) / len(all_gone)
                exact = f"| {share:.4f} of {len(all_gone):,} | {time.process_time() - started:.0f} |"
            table.append(f"| {number:,} | {wall:.0f} | {cpu:.0f} | {len(gone):,} {exact}")
    return table


def brute(vectors: np.ndarray) -> np.ndarray:
    """Keepers by comparing each vector with all before it that stay."""
    known, keepers = np.float32(vectors), np.full(len(vectors), -1)
    for start in range(0, len(known), 1024):
        block = known[start : start + 1024]
        cosines = block @ known[: start + len(block)].T
        for row in np.flatnonzero((cosines >= SIMILARITY).sum(axis=1) > 1):
            before = np.flatnonzero(cosines[row, : start + row] >= SIMILARITY)
            before = before[keepers[before] < 0]
            if len(before):
                keepers[start + row] = before[0]
    return keepers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--compared", type=int, default=20_000, help="vectors that brute force is run on")
    parser.add_argument("--memory", type=int, default=400, help="MB for vectors: a tenth of --memory-limit")
    parser.add_argument("--threads", type=int, help="default: one per core")
    args = parser.parse_args()
    lines = [*concepts(args.captions), ""]
    lines += semantic(args.vectors, args.compared, args.memory << 20, args.threads)
    note = f"Vectors of {SIZE} numbers, {COPIES:.0%} copies at a cosine of 0.97; from {SIMILARITY}; {args.memory} MB."
    write_result("curation", [*lines, "", note], describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
