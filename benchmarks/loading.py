"""Does the loader outrun the step? Images per second and core from tars of photographs, and what a GPU asks for.

    python benchmarks/loading.py [--widths 512 1024 2048 4096] [--samples 46] [--workers 1 2]

Photographs of 4:3 are read from a tar, decoded, resized to 384 px and collated to packs of 4096 positions by
PackedDataset and PackingCollator: decoded whole and resized by Pillow, as in a call of the processor; resized by
torch; and with JPEGs decoded at a fraction of their size as well, the default. Then the same through a DataLoader with
worker processes, whose memory is read from /proc. Prints a Markdown table and writes it to
benchmarks/results/loading.md.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gpu_check.models import SIZES, make_config
from photo_packs import make_packs, make_processor, photograph
from qwen_vl_step import image_rows
from report import describe_machine, write_result
from torch.utils.data import DataLoader

from open_qwen2vl import OpenQwen2VLProcessor, PackedDataset, PackingCollator
from open_qwen2vl.families.interface import StepWork
from open_qwen2vl.families.open_qwen2vl_model import OpenQwen2VLPackedModel
from open_qwen2vl.processing import images
from open_qwen2vl.trainer.figures.flops import GPUS

IMAGE_SIZE = 384
BUDGET = 144
HEADER = "| photograph | Pillow: images/s | torch | and JPEG at a fraction | gain | mean difference | largest | 99 % |"


def read_all(dataset: PackedDataset) -> tuple[int, float]:
    """Images and CPU seconds of one pass in this process."""
    collator = PackingCollator()
    started = time.process_time()
    number = sum(collator([dataset[i]])["packing_stats"]["images"] for i in range(len(dataset)))
    return number, time.process_time() - started


def ways(processor: OpenQwen2VLProcessor) -> dict[str, Callable[[bytes], torch.Tensor]]:
    """Bytes of a file to pixels: as the processor's own calls do, resized by torch, and PackedDataset's default."""

    read_image = processor.read_image

    def whole(data: bytes) -> torch.Tensor:
        kept, images.DRAFT_MARGIN = images.DRAFT_MARGIN, 1_000_000
        pixels = read_image(data)
        images.DRAFT_MARGIN = kept
        return pixels

    return {
        "pillow": lambda data: processor.resize_images([images.decode_image(data)]),
        "torch": whole,
        "fraction": read_image,
    }


def measure_width(folder: Path, width: int, samples: int, repeats: int) -> str:
    """One row of the first table: the best of `repeats` passes each way, in turn."""
    height = width * 3 // 4
    processor = make_processor(IMAGE_SIZE, BUDGET)
    dataset = PackedDataset(make_packs(folder, processor, samples, width, height), processor)
    readers, best = ways(processor), {}
    for _ in range(repeats):
        for name, read in readers.items():
            processor.read_image = read
            number, seconds = read_all(dataset)
            best[name] = max(best.get(name, 0.0), number / seconds)
    data = [photograph(width, height, seed) for seed in range(3)]
    difference = (
        torch.cat([readers["pillow"](one).int() - readers["fraction"](one).int() for one in data]).abs().float()
    )
    speeds = " | ".join(f"{best[name]:.1f}" for name in readers)
    return (
        f"| {width} x {height} | {speeds} | {best['fraction'] / best['pillow']:.2f} | {difference.mean():.3f} "
        f"| {difference.max():.0f} | {np.quantile(difference.numpy(), 0.99):.0f} |"
    )


def own_memory(pid: int) -> float:
    """MB that a process has for itself, without what it shares with its parent."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def measure_workers(folder: Path, width: int, samples: int, workers: int) -> str:
    """One row of the second table."""
    processor = make_processor(IMAGE_SIZE, BUDGET)
    dataset = PackedDataset(make_packs(folder, processor, samples, width, width * 3 // 4), processor)
    loader = DataLoader(dataset, batch_size=1, collate_fn=PackingCollator(), num_workers=workers, shuffle=True)
    number, largest = 0, 0.0
    started = time.perf_counter()
    batches = iter(loader)
    for batch in batches:
        number += batch["packing_stats"]["images"]
        for worker in getattr(batches, "_workers", []):
            largest = max(largest, own_memory(worker.pid))
    seconds = time.perf_counter() - started
    memory = f"{largest:.0f}" if workers else "-"
    return f"| {workers} | {number / seconds:.1f} | {memory} |"


def demand(utilisation: float) -> list[str]:
    """Images per second that a training step of captions consumes on one GPU."""
    lines = [f"| model | GPU | images/s at {utilisation:.0%} of its peak |", "|---|---|---:|"]
    documents, length = 23, 176
    for size in ("0.5b", "2b"):
        config = make_config(size)
        vision = OpenQwen2VLPackedModel().vision_work(config, documents, documents * BUDGET)
        work = StepWork(documents * length, documents * length**2, documents, vision)
        trained = {"language_model": 1, "projector": 1, "vision_tower": 0}
        flops = OpenQwen2VLPackedModel().step_flops(config, work, trained)
        for name in ("h100", "a100-80gb", "rtx4090"):
            rate = utilisation * GPUS[name].peak_flops / flops * documents
            lines.append(f"| {SIZES[size]['title']} | {name} | {rate:.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 1024, 2048, 4096], help="of the photographs")
    parser.add_argument("--samples", type=int, default=46, help="photographs of each width (default: 46, two packs)")
    parser.add_argument("--repeats", type=int, default=3, help="passes; the best counts (default: 3)")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], help="of the second table")
    parser.add_argument("--worker-width", type=int, default=1024, help="photographs of the second table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure_width(Path(folder, str(width)), width, args.samples, args.repeats) for width in args.widths]
        worker_rows = [
            measure_workers(Path(folder, f"workers{n}"), args.worker_width, 4 * args.samples, n) for n in args.workers
        ]
    table = [
        "Images per CPU second of one core: read, decoded, resized, tokenised and collated. Differences are grey",
        "levels (of 256) between the first way and the last.",
        "",
        HEADER,
        "|---|" + "---:|" * (HEADER.count("|") - 2),
        *rows,
        "",
        f"The same through a DataLoader, wall time, photographs {args.worker_width} px wide, shuffled packs; starting",
        "the workers is in it. Memory is what a worker has for itself.",
        "",
        "| workers | images/s | MB of the largest worker |",
        "|---:|---:|---:|",
        *worker_rows,
        "",
        "What a step asks for, from its FLOPs (captions of 176 positions, frozen vision tower):",
        "",
        *demand(0.5),
        "",
        *image_rows([(640, 480), (1024, 768), (2048, 1536)]),
    ]
    write_result("loading", table, describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
