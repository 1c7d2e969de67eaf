"""Planning packs of conversations: records/s and peak memory on a synthetic MAmmoTH file, one array on one line.

Two records share an image of a zip (several conversations on one image); texts are random words, 1.5 kB a record on
average. Measured in a process each: finding the groups of records (a pass over all bytes), indexing the archive, and
the whole `plan_packs` with the tokenizer given. Memory is flat if the peak does not grow with the number of records.
Prints a Markdown table and writes it to benchmarks/results/indexing.md.

    python benchmarks/indexing.py --tokenizer Qwen/Qwen2.5-1.5B [--records 200000 2000000] [--folder DIR]
"""

import argparse
import json
import multiprocessing
import resource
import shlex
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from report import describe_machine, write_result
from transformers import AutoTokenizer

from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.storage.image_files import describe_images, index_archives, remove_index
from open_qwen2vl.data.storage.json_records import cut_records
from open_qwen2vl.processing.text_formats import prepare_tokenizer

HEADER = ["records", "step", "CPU seconds", "records/s", "MB/s", "MB at start", "MB peak"]
WORDS = "the a of on in and is are two red blue man woman dog street table picture shows image left right".split()


def write_archive(path: Path, images: int) -> None:
    """A zip of tiny members: to plan, no image is opened."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(images):
            archive.writestr(f"set/{number % 1000:03d}/{number}.jpg", b"x")


def write_records(path: Path, records: int, images: int) -> None:
    """An array of records as MAmmoTH-VL has them, without a newline."""
    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf8") as file:
        for number in range(records):
            turns = []
            for turn, words in enumerate(rng.geometric(1 / 110, 2)):
                text = " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 10 + words))
                turns += [{"from": "human", "value": "<image>\n" * (turn == 0) + text[:60] + "?"}]
                turns += [{"from": "gpt", "value": f'{text}.\n"{number}" \u00e9'}]
            name = f"set/{number % images % 1000:03d}/{number % images}.jpg"
            record = {"id": f"{number:09d}", "source": "made", "image": name, "conversations": turns}
            file.write(("[" if number == 0 else ", ") + json.dumps(record))
        file.write("]")


def peak() -> float:
    """Most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(step: Callable[[], None], queue: multiprocessing.Queue) -> None:
    """CPU seconds and memory of a step, in a process of its own."""
    before, started = peak(), time.process_time()
    step()
    queue.put((time.process_time() - started, before, peak()))


def steps(source: Path, archive: Path, folder: Path, tokenizer_name: str) -> dict[str, Callable[[], None]]:
    """What is measured."""
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(tokenizer_name, trust_remote_code=False))

    def index() -> None:
        folder.mkdir(exist_ok=True)
        index_archives(folder, describe_images([archive], folder))
        remove_index(folder)

    def plan() -> None:
        plan_packs([source], folder, tokenizer, image_seq_length=729, images=[archive], num_workers=1)

    return {"find the groups": lambda: cut_records(source, 10_000), "index the archive": index, "plan": plan}


def measure_file(records: int, folder: Path, tokenizer_name: str) -> list[list[str]]:
    """Rows of the table for one size."""
    source, archive = folder / f"{records}.json", folder / f"{records}.zip"
    write_archive(archive, records // 2)
    write_records(source, records, records // 2)
    rows = []
    for name, step in steps(source, archive, folder / f"packs{records}", tokenizer_name).items():
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=measure, args=(step, queue))
        process.start()
        seconds, before, most = queue.get()
        process.join()
        size = archive.stat().st_size if "archive" in name else source.stat().st_size
        number = records // 2 if "archive" in name else records
        rates = f"{number / seconds:,.0f}", f"{size / seconds / 1e6:.1f}"
        rows.append([f"{records:,}", name, f"{seconds:.1f}", *rates, f"{before:.0f}", f"{most:.0f}"])
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="hub id or folder of the model's tokenizer")
    parser.add_argument("--records", type=int, nargs="+", default=[200_000, 2_000_000], help="sizes of the file")
    parser.add_argument("--folder", help="where files are made (default: the system's temporary folder)")
    args = parser.parse_args()
    rows = []
    for records in args.records:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows += measure_file(records, Path(folder), args.tokenizer)
    table = ["| " + " | ".join(row) + " |" for row in [HEADER, *rows]]
    table.insert(1, "|---|---|" + "---:|" * (len(HEADER) - 2))
    note = "One process, one thread. The rates of the archive's index are in members and in bytes of the zip."
    write_result("indexing", [*table, "", note], describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
