"""Planning packs of captions: CPU seconds and bytes read, from the tars and from their indexes.

Tars of photographs with a caption and a json, as img2dataset writes them. Measured in a process each, with the
tokenizer given: a plan that walks the tars and makes their indexes, as the first over the tars of others does; a
second plan by these; and a plan over the same samples, resharded, by the indexes beside them. Bytes are what the
process asked the system for, from files of any kind, after a first plan has imported all. Prints a Markdown table and
writes it to benchmarks/results/planning.md.

    python benchmarks/planning.py --tokenizer Qwen/Qwen2.5-1.5B [--pairs 20000] [--tars 4] [--folder DIR]
"""

import argparse
import io
import json
import multiprocessing
import random
import resource
import shlex
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from photo_packs import photograph
from report import describe_machine, write_result
from transformers import AutoTokenizer

from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.resharding.options import ReshardOptions
from open_qwen2vl.data.resharding.resharding import reshard
from open_qwen2vl.data.storage.uids import UID_DTYPE, write_uids
from open_qwen2vl.processing.text_formats import prepare_tokenizer

WORDS = "the a of on in and is are two red blue man woman dog street table picture shows image left right".split()
HEADER = ["plan", "CPU seconds", "pairs/s", "MB read", "of the tars", "28.4M pairs on 8 cores, minutes"]


def write_tar(path: Path, pairs: int, seed: int, image: bytes) -> None:
    """Pairs of one photograph and captions of 5 to 60 words."""
    draw = random.Random(seed)
    with tarfile.open(path, "w") as tar:
        for number in range(pairs):
            caption = " ".join(draw.choices(WORDS, k=min(60, 5 + int(draw.expovariate(1 / 12)))))
            uid = f"{seed * pairs + number:032x}"
            metadata = {"caption": caption, "url": f"https://example.org/{uid}.jpg", "uid": uid, "status": "success"}
            members = {"jpg": image, "json": json.dumps(metadata).encode(), "txt": caption.encode()}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def bytes_read() -> int:
    """What this process has asked for so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def measure(tars: list[Path], output: Path, indexes: Path, tokenizer_name: str) -> tuple[float, int, int]:
    """CPU seconds, bytes and pairs of a plan."""
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(tokenizer_name, trust_remote_code=False))
    options = {"image_seq_length": 144, "num_workers": 1}
    with tempfile.TemporaryDirectory() as folder:
        write_tar(Path(folder) / "one.tar", 1, 0, b"x")
        plan_packs([f"{folder}/one.tar"], f"{folder}/packs", tokenizer, **options)
    before, read = resource.getrusage(resource.RUSAGE_SELF), bytes_read()
    report = plan_packs(tars, output, tokenizer, indexes=str(indexes), **options)
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, bytes_read() - read, report.documents


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="hub id or folder of the model's tokenizer")
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs in all")
    parser.add_argument("--tars", type=int, default=4, help="tars that hold them")
    parser.add_argument("--folder", help="where files are made (default: the system's temporary folder)")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, image = Path(name), photograph(480, 360, 0)
        tars = [folder / f"{number:05d}.tar" for number in range(args.tars)]
        for number, tar in enumerate(tars):
            write_tar(tar, args.pairs // args.tars, number, image)
        uids = np.array([(0, number) for number in range(args.pairs)], UID_DTYPE)
        write_uids(folder / "subset.npy", uids)
        options = {"samples_per_shard": args.pairs // args.tars, "num_workers": 1}
        reshard(ReshardOptions(tuple(map(str, tars)), str(folder / "subset.npy"), str(folder / "shards"), **options))
        shards, indexes = sorted((folder / "shards").glob("*.tar")), folder / "indexes"
        plans = {
            "of tars without indexes, which it makes": tars,
            "of these tars again": tars,
            "of resharded tars": shards,
        }
        for number, (kind, own) in enumerate(plans.items()):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                used, read, pairs = pool.apply(measure, (own, folder / f"packs{number}", indexes, args.tokenizer))
            share = read / sum(tar.stat().st_size for tar in own)
            minutes = 28.4e6 / (pairs / used) / 8 / 60
            rows.append(
                [kind, f"{used:.1f}", f"{pairs / used:,.0f}", f"{read / 1e6:,.1f}", f"{share:.2%}", f"{minutes:.1f}"]
            )
            print(rows[-1], flush=True)
    table = ["| " + " | ".join(row) + " |" for row in [HEADER, *rows]]
    table.insert(1, "|---|" + "---:|" * (len(HEADER) - 1))
    note = (
        f"{args.pairs:,} pairs in {args.tars} tars; one process, one thread. The last column is that rate on 8 such "
        "cores: groups are planned apart from each other, and what one process does for all (settings of the parts, "
        "figures of packs) is below a minute at 355 parts."
    )
    write_result("planning", [*table, "", note], describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
