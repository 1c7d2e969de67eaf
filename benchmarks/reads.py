"""Reads of a tar for each sample of a pack: image and text at once where they lie side by side, against one by one.

    python benchmarks/reads.py [--samples 3000] [--width 512] [--repeats 3] [--folder DIR]

Documents of a real plan over a tar of photographs, in random order, read as a loader's worker does and not decoded:
from the page cache, and after the kernel was asked to drop the tar from it, in turn; the best pass counts. The last
columns are whole packs, decoded and tokenised, from the cache. Prints a Markdown table and writes it to
benchmarks/results/reads.md. `--folder` chooses the disk.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from loading import read_all
from photo_packs import make_packs, make_processor
from report import describe_machine, write_result

from open_qwen2vl import PackedDataset
from open_qwen2vl.data.documents import records
from open_qwen2vl.data.documents.record_images import PlannedImage, RecordImages
from open_qwen2vl.data.documents.records import OwnImage, RecordReader
from open_qwen2vl.data.storage.open_files import NOTHING

WAYS = {"one by one": lambda *_: NOTHING, "at once (default)": records.read_together}


class CountedReads:
    """Counts the reads of this process at a location."""

    def __init__(self):
        self.number, self._pread = 0, os.pread

    def __call__(self, *args) -> bytes:
        self.number += 1
        return self._pread(*args)


def read_bytes(tar: Path, documents: list[dict]) -> float:
    """Wall seconds to read text and image of each document."""
    reader = RecordReader([str(tar)], "caption", None)
    images = RecordImages(tar.parent, [str(tar)], [], reader)
    started = time.perf_counter()
    for document in documents:
        reader.read(document)
        for image in document["images"]:
            images.read(document, OwnImage(), PlannedImage(**image))
    return time.perf_counter() - started


def forget(tar: Path) -> None:
    """Ask the kernel to drop a file from its cache."""
    with open(tar, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(tar: Path, dataset: PackedDataset, repeats: int) -> list[str]:
    """Rows of the table."""
    documents = [document for number in range(len(dataset)) for document in dataset._documents(number)]
    random.Random(0).shuffle(documents)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in WAYS}
    for _ in range(repeats):
        # In turn, so that other work on the machine meets both alike.
        for name, way in WAYS.items():
            records.read_together, os.pread = way, CountedReads()
            for kind in ("dropped", "cached"):
                if kind == "dropped":
                    forget(tar)
                os.pread.number = 0
                seconds = read_bytes(tar, documents)
                reads = os.pread.number / len(documents)
                found[name].setdefault(kind, []).append(1e6 * seconds / len(documents))
            images, seconds = read_all(dataset)
            found[name].setdefault("packs", []).append(seconds / len(dataset))
            found[name]["reads"] = [reads]
            os.pread = os.pread._pread
    best = {name: {kind: min(values) for kind, values in own.items()} for name, own in found.items()}
    return [
        f"| {name} | {one['reads']:.0f} | {one['cached']:.0f} | {one['dropped']:.0f} | {1 / one['packs']:.2f} |"
        for name, one in best.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--width", type=int, default=512, help="of the photographs, four by three (default: 512)")
    parser.add_argument("--repeats", type=int, default=3, help="passes; the best counts (default: 3)")
    parser.add_argument("--folder", help="where the tar is written; the default is that of temporary files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        processor = make_processor(384, 144)
        packs = make_packs(Path(folder), processor, args.samples, args.width, args.width * 3 // 4)
        rows = measure(Path(folder) / "00000.tar", PackedDataset(packs, processor), args.repeats)
        size = (Path(folder) / "00000.tar").stat().st_size / args.samples / 1000
    table = [
        f"{args.samples} samples of {size:.0f} kB; microseconds of wall time to read one; packs a CPU second.",
        "",
        "| image and text | reads a sample | cached: us | dropped from the cache: us | packs/s |",
        "|---|---:|---:|---:|---:|",
        *rows,
    ]
    write_result("reads", table, describe_machine(f"python benchmarks/reads.py {' '.join(sys.argv[1:])}".strip()))


if __name__ == "__main__":
    main()
