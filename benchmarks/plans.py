"""Start, lookups and memory on plans of up to a billion pairs: real files of a plan, tars that are holes.

A part is planned from pairs as in the paper (22 a pack of 4,096 positions) and is there under the name of each part by
a hard link; its tars are sparse files, so that nothing can be read but where the documents are. Measured in a process
each: what the first rank does (a look at every file), the start of any other rank (dataset, mixture, order), its first
index of an epoch, and packs looked up at random, cold, with the memory of the process before and after. Prints a
Markdown table and writes it to benchmarks/results/plans.md.

    python benchmarks/plans.py [--pairs 28400000 1000000000] [--lookups 4000] [--folder DIR]
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from photo_packs import make_processor
from report import describe_machine, write_result

from open_qwen2vl.data.documents.items import Document
from open_qwen2vl.data.documents.record_images import PlannedImage
from open_qwen2vl.data.documents.records import OWN, RecordLocation
from open_qwen2vl.data.packing.bins import pack_lengths
from open_qwen2vl.data.packing.mixture import PackMixture
from open_qwen2vl.data.packing.pack_order import PackOrder
from open_qwen2vl.data.packing.packed_dataset import PackedDataset, check_files
from open_qwen2vl.data.packing.plan_files import (
    FORMAT_VERSION,
    packs_table,
    part_name,
    read_part_figures,
    read_plan,
    write_part,
    write_plan,
)
from open_qwen2vl.data.packing.sources import parse_sources
from open_qwen2vl.families import document_processor
from open_qwen2vl.files import describe_shard
from open_qwen2vl.processing.text_formats import tokenizer_fingerprint

PAIRS_A_TAR, TARS_A_PART, IMAGE_TOKENS = 10_000, 8, 144
HEADER = ["pairs", "tars", "packs", "first rank: CPU s", "start: CPU s", "first index: CPU s", "its MB"]
HEADER += ["a lookup: CPU ms", "wall ms", "worker: MB, private", "after the lookups"]


def documents(rng: np.random.Generator) -> list[Document]:
    """The pairs of a part."""
    texts = rng.geometric(1 / 30, PAIRS_A_TAR * TARS_A_PART) + 4
    sizes, rows, offset = rng.integers(10_000, 110_000, len(texts)), [], 0
    for number, (text, size) in enumerate(zip(texts.tolist(), sizes.tolist(), strict=True)):
        tar, row = divmod(number, PAIRS_A_TAR)
        offset = 512 if not row else offset
        image, caption = PlannedImage(OWN, offset, size), RecordLocation(offset + size + 512, text * 4)
        uid = rng.bytes(16).hex()
        rows.append(Document(tar, f"{row:09d}", uid, caption, (0, 2), IMAGE_TOKENS + text, [image], 0, text, 576))
        offset = caption.offset + text * 4 + 2048
    return rows


def make_plan(folder: Path, pairs: int, processor: Any) -> Path:
    """A plan of so many pairs, rounded up to whole parts; its folder."""
    packs, tars = folder / f"packs{pairs}", folder / f"tars{pairs}"
    packs.mkdir()
    tars.mkdir()
    parts = -(-pairs // (PAIRS_A_TAR * TARS_A_PART))
    rows = documents(np.random.default_rng(0))
    lengths = np.array([row.tokens for row in rows])
    write_part(folder / "part", packs_table(rows, pack_lengths(lengths, 4096)), {"settings": {}, "report": {}})
    shards = []
    for number in range(parts * TARS_A_PART):
        path = tars / f"{number:06d}.tar"
        path.touch()
        os.truncate(path, 600_000_000)
        shards.append(describe_shard(path, packs))
    for number in range(parts):
        os.link(folder / "part", packs / part_name(number))
    (folder / "part").unlink()
    figures = read_part_figures(packs / part_name(0))
    family = document_processor(processor)
    totals = {"packs": figures.shape[1] * parts, "parts": parts, "shards": len(shards), "documents": len(rows) * parts}
    plan = {"format_version": FORMAT_VERSION, "tokenizer": tokenizer_fingerprint(processor.tokenizer), "images": []}
    plan |= {"text_format": "caption", "caption_column": None, "text_only": False, "max_length": 4096}
    write_plan(packs, {**plan, "vision": family.fingerprint(), "totals": totals}, shards, [figures] * parts)
    return packs


def private() -> float:
    """MB of this process that no file is behind."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def seconds(step: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a step, system time included, and what it returned."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    result = step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


def first_rank(packs: Path, _: Any, __: int) -> list[float]:
    """What one rank does for all."""
    return [seconds(lambda: check_files(packs, read_plan(packs)))[0]]


def other_rank(packs: Path, processor: Any, _: int) -> list[float]:
    """What every rank does."""
    sources, before = parse_sources(str(packs)), private()
    start, mixture = seconds(lambda: PackMixture(sources, processor, files_checked=True))
    first, _ = seconds(lambda: next(iter(PackOrder(mixture, 64, 4, 1, seed=0))))
    return [start, first, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before]


def worker(packs: Path, processor: Any, lookups: int) -> list[float]:
    """What a loader's worker does with a plan."""
    dataset = PackedDataset(packs, processor, files_checked=True)
    draw = random.Random(0)
    indices = [draw.randrange(len(dataset)) for _ in range(lookups)]
    dataset._documents(indices[0])
    before, started = private(), time.perf_counter()
    used, _ = seconds(lambda: [dataset._documents(index) and None for index in indices])
    wall = time.perf_counter() - started
    return [1000 * used / lookups, 1000 * wall / lookups, before, private()]


def in_a_process(step: Callable[..., list[float]], *arguments: Any) -> list[float]:
    """What a step measured, in a process of its own."""
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        return pool.apply(step, arguments)


def measure(folder: Path, pairs: int, lookups: int) -> list[str]:
    """A row of the table."""
    processor = make_processor(384, IMAGE_TOKENS)
    packs = make_plan(folder, pairs, processor)
    found = [
        number for step in (first_rank, other_rank, worker) for number in in_a_process(step, packs, processor, lookups)
    ]
    totals = json.loads((packs / "plan.json").read_text())["totals"]
    row = [f"{totals[name]:,}" for name in ("documents", "shards", "packs")]
    digits = (1, 3, 1, 0, 2, 2, 0, 0)
    return row + [f"{number:,.{digit}f}" for number, digit in zip(found, digits, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=[28_400_000, 1_000_000_000], help="sizes of the plan")
    parser.add_argument("--lookups", type=int, default=4000, help="packs that a worker looks up")
    parser.add_argument("--folder", help="where the plans are made (default: the system's temporary folder)")
    args = parser.parse_args()
    rows = []
    for pairs in args.pairs:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append(measure(Path(folder), pairs, args.lookups))
        print(rows[-1], flush=True)
    table = ["| " + " | ".join(row) + " |" for row in [HEADER, *rows]]
    table.insert(1, "|" + "---:|" * len(HEADER))
    note = (
        f"{args.lookups:,} lookups, each of another part. Start: dataset and mixture of a rank that is told that the "
        "files are there. Its MB: the most that the order of an epoch takes, once a rank, beside what is mapped."
    )
    write_result("plans", [*table, "", note], describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
