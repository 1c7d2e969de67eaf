"""The data steps on synthetic tars: reshard against `cp`, planning from headers and by index, memory for any size.

The pool has tars of 10,000 samples: a JPEG header in front of random bytes (35 kB on average, as DataComp's), a
caption and a json with the uid. Memory is measured on samples of 400 bytes, with a process for each step, and is flat
if the peak does not grow with their number. CLIP scoring has its own script, data_scoring.py. Prints a Markdown table
and writes it to benchmarks/results/data.md.

    python benchmarks/data.py --tokenizer Qwen/Qwen2.5-1.5B [--tars 4] [--samples 10000 1000000] [--folder DIR]
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from report import describe_machine, write_result
from transformers import AutoTokenizer

from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.resharding.options import ReshardOptions
from open_qwen2vl.data.resharding.resharding import reshard
from open_qwen2vl.data.storage.uids import UID_DTYPE, format_uid, write_uids
from open_qwen2vl.processing.text_formats import prepare_tokenizer

SAMPLES_PER_TAR = 10_000
WORDS = "the a of on in and is are two red blue man woman dog street table picture shows image left right".split()
HEADER = ["step", "samples", "GB", "seconds", "CPU seconds", "samples/s of one core", "of cp"]
MEMORY_HEADER = ["step", "samples", "MB at start", "MB peak"]


def write_template(path: Path, image_bytes: int, samples: int) -> list[int]:
    """A tar, and the places of its uids, which the other tars of a pool have others in."""
    rng = np.random.default_rng(0)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    places = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(samples):
            size = 0 if image_bytes < 1000 else int(rng.gamma(2, image_bytes / 2))
            caption = " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), rng.geometric(1 / 12)))
            metadata = json.dumps({"uid": "0" * 32, "status": "success", "width": 512, "height": 384})
            for ext, content in (
                ("jpg", picture.getvalue()[:400] + rng.bytes(size)),
                ("txt", caption.encode()),
                ("json", metadata.encode()),
            ):
                info = tarfile.TarInfo(f"{number:08d}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            places.append(tar.offset - 512 + metadata.index("0" * 32))
    return places


def write_pool(folder: Path, tars: int, image_bytes: int, samples: int = SAMPLES_PER_TAR) -> np.ndarray:
    """Tars that differ in their uids; returns these."""
    folder.mkdir()
    places = write_template(folder / "template", image_bytes, samples)
    content = bytearray((folder / "template").read_bytes())
    (folder / "template").unlink()
    uids = np.zeros(tars * samples, UID_DTYPE)
    uids["f0"] = np.random.default_rng(1).integers(0, 2**63, len(uids), dtype=np.uint64)
    for tar in range(tars):
        for place, (high, low) in zip(places, uids[tar * samples : (tar + 1) * samples].tolist(), strict=True):
            content[place : place + 32] = format_uid(high, low).encode()
        (folder / f"{tar:05d}.tar").write_bytes(content)
    return uids


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    started, used = time.perf_counter(), cpu_seconds()
    step()
    return time.perf_counter() - started, cpu_seconds() - used


def best(step: Callable[[Path], object], folder: Path, repeats: int, sync: bool = False) -> tuple[float, float]:
    """The least wall and CPU seconds of some runs, each into a fresh folder."""

    def run(output: Path) -> None:
        step(output)
        for path in output.iterdir() if sync else ():
            with open(path, "rb") as file:
                os.fsync(file)

    runs = []
    for number in range(repeats):
        output = folder / f"run{number}"
        output.mkdir()
        runs.append(timed(lambda output=output: run(output)))
        shutil.rmtree(output)
    return min(wall for wall, _ in runs), min(cpu for _, cpu in runs)


def measure_speed(folder: Path, tars: int, tokenizer_name: str, repeats: int, workers: int) -> list[list[str]]:
    """Reshard of all, and of a seventh, in the order of the pool and shuffled, and planning."""
    pool, subset, rows = folder / "pool", folder / "subset.npy", []
    uids = write_pool(pool, tars, 35_000)
    paths = sorted(pool.iterdir())
    for share in (1, 7):
        write_uids(subset, np.sort(uids)[::share])
        made = folder / "made"
        reshard(ReshardOptions(paths, subset, made, num_workers=1))
        copied = sorted(made.glob("*.tar"))
        size = sum(path.stat().st_size for path in copied) / 1e9
        steps = {
            "cp": lambda output, copied=copied: subprocess.run(["cp", *map(str, copied), str(output)], check=True),
            "reshard": lambda output: reshard(ReshardOptions(paths, subset, output, num_workers=workers)),
            "reshard --shuffle": lambda output: reshard(
                ReshardOptions(paths, subset, output, num_workers=workers, shuffle=True)
            ),
        }
        for sync in (False, True):
            seconds = {name: best(step, folder, repeats, sync) for name, step in steps.items()}
            for name, (wall, cpu) in seconds.items():
                kept = len(uids[::share])
                label = f"{name}, {f'1 of {share}' if share > 1 else 'all'} samples" + ", to the disk" * sync
                rates = f"{kept / cpu:,.0f}", f"{seconds['cp'][0] / wall:.2f}"
                rows.append([label, f"{kept:,}", f"{size:.2f}", f"{wall:.2f}", f"{cpu:.2f}", *rates])
                print(rows[-1], flush=True)
        if share == 1:
            rows += measure_planning(paths, copied, folder, tokenizer_name, repeats)
        shutil.rmtree(made)
    return rows


def measure_planning(pool: list[Path], indexed: list[Path], folder: Path, name: str, repeats: int) -> list[list[str]]:
    """Planning of the pool, which has no index, and of the same samples with one."""
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(name, trust_remote_code=False))
    rows = []
    for label, tars in (("pack, from headers", pool), ("pack, by index", indexed)):
        wall, cpu = best(lambda output, tars=tars: plan_packs(tars, output, tokenizer, num_workers=1), folder, repeats)
        samples = len(pool) * SAMPLES_PER_TAR
        rows.append([label, f"{samples:,}", "", f"{wall:.2f}", f"{cpu:.2f}", f"{samples / cpu:,.0f}", ""])
        print(rows[-1], flush=True)
    return rows


def peak() -> float:
    """Most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(folder: Path, samples: int, tokenizer_name: str) -> list[list[str]]:
    """Peak memory of the steps on a pool of one size, in a process each."""
    pool, subset, rows = folder / "pool", folder / "subset.npy", []
    uids = write_pool(pool, max(1, samples // SAMPLES_PER_TAR), 400, min(samples, SAMPLES_PER_TAR))
    write_uids(subset, np.sort(uids))
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(tokenizer_name, trust_remote_code=False))
    paths, out = sorted(pool.iterdir()), folder / "out"
    steps = {
        "reshard --shuffle": lambda: reshard(ReshardOptions(paths, subset, out, num_workers=1, shuffle=True)),
        "pack, from headers": lambda: plan_packs(paths, folder / "packs", tokenizer, num_workers=1),
        "pack, by index": lambda: plan_packs(sorted(out.glob("*.tar")), folder / "again", tokenizer, num_workers=1),
    }
    context = multiprocessing.get_context("fork")
    for name, step in steps.items():
        queue = context.Queue()
        process = context.Process(target=lambda step=step, queue=queue: queue.put((peak(), step(), peak())))
        process.start()
        before, _, most = queue.get()
        process.join()
        rows.append([name, f"{samples:,}", f"{before:.0f}", f"{most:.0f}"])
        print(rows[-1], flush=True)
    return rows


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table."""
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return [lines[0], "|---|" + "---:|" * (len(header) - 1), *lines[1:], ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="hub id or folder of the model's tokenizer")
    parser.add_argument("--tars", type=int, default=4, help="of 10,000 samples, 360 MB each, for the speeds")
    parser.add_argument("--samples", type=int, nargs="*", default=[10_000, 1_000_000], help="for the memory")
    parser.add_argument("--workers", type=int, default=1, help="of reshard (CPU seconds are those of one only)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the best counts")
    parser.add_argument("--folder", help="where files are made (default: the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure_speed(Path(folder), args.tars, args.tokenizer, args.repeats, args.workers)
    memory = []
    for samples in args.samples:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            memory += measure_memory(Path(folder), samples, args.tokenizer)
    note = (
        f"Workers of reshard: {args.workers}, of pack: 1; the files are in memory when they are read; `to the disk`: "
        "each file with an fsync at the end. "
        "The last column compares seconds."
    )
    command = shlex.join(["python", *sys.argv])
    load = f"Load of the machine at the end, which had other work: {os.getloadavg()[2]:.1f} (15 minutes)."
    write_result(
        "data", [*markdown(HEADER, rows), note, "", *markdown(MEMORY_HEADER, memory), load], describe_machine(command)
    )


if __name__ == "__main__":
    main()
