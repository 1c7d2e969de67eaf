"""Packs a second of a loader whose shards lie in a bucket, by ranges and by a cache of shards, against a local disk.

    python benchmarks/buckets.py [--samples 900] [--workers 2] [--step 0.5] [--folder DIR]

A real plan over tars of photographs, in a local S3 server behind a proxy that delays each answer by 0, 10 and 50 ms.
Each way is read as a training reads it, once as fast as it goes and once with a step of `--step` seconds a pack (a
sleep), whose waits for the loader are counted: `data wait` is their share of the time. Server, proxy and loader share
the machine's cores, so that the rates without delay are those of the server, which is written in Python. Prints a
Markdown table and writes it to benchmarks/results/buckets.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from photo_packs import make_processor, write_tar
from report import describe_machine, write_result
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from open_qwen2vl import PackedDataset
from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.documents.documents import RANGES, Remote
from open_qwen2vl.data.storage.shard_cache import ShardCache
from tests.faulty_proxy import Faults, FaultyProxy

SERVER = (
    "import logging, time\nfrom moto.server import ThreadedMotoServer\nlogging.disable()\n"
    "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\nserver.start()\n"
    "print('PORT', server.get_host_and_port()[1], flush=True)\ntime.sleep(7200)"
)
SHARDS = 6


@contextmanager
def server() -> Iterator[str]:
    """Address of an S3 server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().rpartition(' ')[2].strip()}"
    finally:
        process.kill()


class Sizes(Dataset):
    """Packs of which the loader gives the lengths alone: what is measured is reading, decoding and tokenising."""

    def __init__(self, dataset: PackedDataset):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> int:
        item = self._dataset[index]
        assert not item["dropped"], item["dropped_places"]
        return len(item["input_ids"])


def read(dataset: PackedDataset, workers: int, step: float) -> tuple[float, float]:
    """Packs a second, and the share of the time that was waited; without the first packs, which start the workers."""
    waited, start, end, count = 0.0, 0.0, 0.0, 0
    batches = iter(DataLoader(Sizes(dataset), batch_size=1, shuffle=True, num_workers=workers, prefetch_factor=4))
    while True:
        asked = time.perf_counter()
        if next(batches, None) is None:
            break
        if count == 2 * workers:
            start, waited = asked, 0.0
        waited += time.perf_counter() - asked
        time.sleep(step)
        count, end = count + 1, time.perf_counter()
    seconds = end - start  # the end of the workers is not counted
    return (count - 2 * workers) / seconds, waited / seconds


def rows(folder: Path, url: str, processor: object, args: argparse.Namespace) -> Iterator[str]:
    """Rows of the table."""
    local = PackedDataset(folder / "local", processor)
    ways = [("local disk", 0, local, None)]
    for delay in (0, 10, 50):
        ways.append(("ranges (default)", delay, PackedDataset(folder / "remote", processor, remote=RANGES), None))
    cache = Remote(cache=ShardCache(folder / "cache", 10**10))
    for state in ("cold", "warm"):
        ways.append((f"cache_dir, {state}", 50, PackedDataset(folder / "remote", processor, remote=cache), state))
    with FaultyProxy(url, Faults()).running() as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        for name, delay, dataset, state in ways:
            found = []
            for step in (0.0, args.step):
                if state == "cold":
                    for path in (folder / "cache").iterdir():
                        path.unlink()
                proxy.faults.delay = delay / 1e3
                proxy.faults.counts.clear()
                found.append((*read(dataset, args.workers, step), proxy.faults.counts["whole"] / len(dataset)))
            (rate, _, requests), (_, waited, _) = found
            yield f"| {name} | {delay} | {rate:.2f} | {waited:.1%} | {requests:.1f} |"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=900)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--step", type=float, default=0.5)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    processor = make_processor(384, 144)
    for name, value in {"ACCESS_KEY_ID": "bench", "SECRET_ACCESS_KEY": "bench", "DEFAULT_REGION": "us-east-1"}.items():
        os.environ[f"AWS_{name}"] = value
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch, server() as url:
        folder = Path(scratch)
        os.environ["AWS_ENDPOINT_URL"] = url
        fs = fsspec.filesystem("s3", use_listings_cache=False)
        fs.mkdir("shards")
        for number in range(SHARDS):
            write_tar(folder / f"{number}.tar", args.samples // SHARDS, 512, 384)
            fs.put_file(str(folder / f"{number}.tar"), f"shards/{number}.tar")
        for name, place in (("local", folder), ("remote", "s3://shards")):
            shards = [f"{place}/{number}.tar" for number in range(SHARDS)]
            options = {"image_seq_length": 144, "num_workers": 1, "shards_per_group": 1}
            plan_packs(shards, folder / name, processor.tokenizer, **options)
        fs.clear_instance_cache()
        table = [
            "| shards | delay of an answer, ms | packs/s | data wait | requests a pack |",
            "|---|---:|---:|---:|---:|",
            *rows(folder, url, processor, args),
        ]
    head = (
        f"{args.samples} photographs with captions in {SHARDS} tars, {args.workers} workers; data wait at a step of "
        f"{args.step:g} s a pack."
    )
    command = f"python benchmarks/buckets.py --samples {args.samples} --workers {args.workers} --step {args.step:g}"
    write_result("buckets", [head, "", *table], describe_machine(command))


if __name__ == "__main__":
    main()
