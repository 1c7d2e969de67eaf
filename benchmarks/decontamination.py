"""Decontamination: recall by kind of change and false alarms on real pictures, and speed on a large index.

Each folder of --pictures holds evaluation pictures of one kind, as files. All of them are indexed; a sample of them is
changed in known ways and looked for; then each of them is a stranger to all others. An alarm for a picture of another
folder is false; one for a picture of its own folder may be the same drawing in another color, so these pairs are
listed in the file of --pairs and left to the eye. Speed is measured on an index of --entries pieces of the pictures.
Prints tables and writes them to benchmarks/results/decontamination.md.

    OMP_NUM_THREADS=1 python benchmarks/decontamination.py --pictures photos/ charts/ --entries 100000
"""

import argparse
import contextlib
import itertools
import multiprocessing
import resource
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image
from PIL.Image import Transpose
from report import describe_machine, write_result
from scipy.stats import beta

sys.path.insert(0, str(Path(__file__).parents[1]))
from open_qwen2vl.decontamination import index as indexing
from open_qwen2vl.decontamination.attacks import self_test
from open_qwen2vl.decontamination.index import ContaminationIndex, build_index
from open_qwen2vl.decontamination.sets import Entry, EvaluationSet, find_sets
from open_qwen2vl.decontamination.views import Unlike, told_apart, views
from open_qwen2vl.processing.images import decode_image

LIMIT = indexing.LIMITS["image"]


def shipped_pictures(folder: Path) -> Path:
    """Real pictures that packages ship, as files."""
    from tests.decontamination.conftest import drawings, photographs

    folder.mkdir()
    for number, picture in enumerate(photographs() + drawings()):
        picture.save(folder / f"{number:03}.png")
    return folder


def recall_table(index: ContaminationIndex, folders: list[Path], count: int) -> list[str]:
    """Recall of each change, of `count` pictures in the proportions of the folders, those that tell nothing aside."""
    entries = np.unique(index.owners)
    chosen = entries[np.unique(np.linspace(0, len(entries) - 1, min(count, len(entries))).astype(int))]
    samples = [
        (int(entry), decode_image((folders[0].parent / "/".join(index.names[entry])).read_bytes())) for entry in chosen
    ]
    rows = ["| change | pictures | recall | precision |", "|---|---:|---:|---:|"]
    for one in self_test(index.like, samples):
        rows.append(f"| {one.kind} | {one.pictures} | {one.recall:.4f} | {one.precision:.4f} |")
    return rows


def false_alarms(index: ContaminationIndex, pairs: Path) -> list[str]:
    """Each picture as a stranger to all others: how many raise an alarm for one of another folder, or of their own."""
    strangers, false, own = Counter(), Counter(), Counter()
    started, found = time.process_time(), []
    for entry in np.unique(index.owners).tolist():
        folder, name = index.names[entry]
        like = index.similarities(decode_image((pairs.parent / folder / name).read_bytes()), sure=2.0)
        alarms = [other for other, similarity in like.items() if similarity >= LIMIT and other != entry]
        strangers[folder] += 1
        false[folder] += any(index.names[other][0] != folder for other in alarms)
        own[folder] += any(index.names[other][0] == folder for other in alarms)
        found += ["\t".join([folder, name, *index.names[other], f"{like[other]:.3f}"]) for other in alarms]
    seconds = time.process_time() - started
    pairs.write_text("\n".join(found), encoding="utf-8")
    rows = ["| strangers | looked for | alarm for another kind | alarm for their own kind |", "|---|---:|---:|---:|"]
    rows += [f"| {name} | {count:,} | {false[name]} | {own[name]} |" for name, count in sorted(strangers.items())]
    total, wrong = strangers.total(), false.total()
    upper = beta.ppf(0.95, wrong + 1, total - wrong)
    return [
        *rows,
        f"| all | {total:,} | {wrong} | {own.total()} |",
        "",
        f"{wrong} of {total:,} are false for sure: below {upper:.1e} with a confidence of 95 % (Clopper-Pearson). "
        f"{seconds / total * 1e3:.1f} CPU ms a stranger, decoding of 256 pixels included.",
    ]


def pieces(folders: list[Path]) -> Iterator[Image.Image]:
    """The quarters of the pictures, each also turned by 90, 180 and 270 degrees: pictures that are not alike here."""
    files = sorted(
        (file for folder in folders for file in folder.iterdir()), key=lambda file: crc32(file.name.encode())
    )
    for file in files:
        image = decode_image(file.read_bytes())
        width, height = image.width // 2, image.height // 2
        for left, top in itertools.product((0, width), (0, height)):
            quarter = image.crop((left, top, left + width, top + height))
            yield quarter
            yield from map(quarter.transpose, (Transpose.ROTATE_90, Transpose.ROTATE_180, Transpose.ROTATE_270))


def told_apart_pieces(folders: list[Path], first: int, count: int) -> Iterator[Image.Image]:
    """Some of those that show enough."""

    def shows_enough(image: Image.Image) -> bool:
        try:
            return bool(told_apart(image))
        except Unlike:
            return False

    yield from itertools.islice(filter(shows_enough, pieces(folders)), first, first + count)


def build_large(folders: list[Path], entries: int, folder: Path) -> tuple[float, float]:
    """CPU seconds and peak memory in MB of an index of pieces."""
    found = (
        Entry(f"piece {number}", [image], []) for number, image in enumerate(told_apart_pieces(folders, 0, entries))
    )
    indexing.read_set = lambda each: found
    started = time.process_time()
    build_index(folder, [EvaluationSet("pieces", (), "pieces")])
    return time.process_time() - started, peak_memory()


def ask_large(folders: list[Path], entries: int, asked: int, folder: Path) -> list[float]:
    """CPU ms of a stranger, and to find candidates; alarms of so many; crops to 85 % found of so many, CPU ms; MB."""
    index = ContaminationIndex(folder)
    strangers = list(told_apart_pieces(folders, entries, asked))
    copies = list(told_apart_pieces(folders, 0, asked))
    copies = [image.crop((8, 12, round(image.width * 0.9), round(image.height * 0.93))) for image in copies]
    for image in strangers[:10]:
        index.match_image(image)  # the file is read, tables are filled
    started = time.process_time()
    alarms = sum(index.match_image(image).similarity >= LIMIT for image in strangers)
    stranger = (time.process_time() - started) / asked
    views_asked = [views(image) for image in strangers]
    started = time.process_time()
    for asked_views in views_asked:
        index._candidates(asked_views)
    searching = (time.process_time() - started) / asked
    found = shown = 0
    started = time.process_time()
    for number, image in enumerate(copies):
        with contextlib.suppress(Unlike):
            found += index.match_image(image).entry == number
            shown += 1
    copied = (time.process_time() - started) / asked
    return [stranger * 1e3, searching * 1e3, alarms, len(strangers), found, shown, copied * 1e3, peak_memory()]


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def speed(folders: list[Path], entries: int, asked: int) -> list[str]:
    """A table of the index of pieces, made in one process and asked in another."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "against"
        with ProcessPoolExecutor(1, context) as pool:
            seconds, built = pool.submit(build_large, folders, entries, folder).result()
        with ProcessPoolExecutor(1, context) as pool:
            stranger, searching, alarms, strangers, found, shown, copied, peak = pool.submit(
                ask_large, folders, entries, asked, folder
            ).result()
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    head = (
        "| pictures | CPU s to index | MB peak | MB on disk | ms a stranger | of it candidates | alarms | ms a copy | "
        "found | MB peak |"
    )
    row = (
        f"| {entries:,} | {seconds:.0f} | {built:,.0f} | {size:,.0f} | {stranger:.1f} | {searching:.1f} | "
        f"{alarms}/{strangers} | {copied:.1f} | {found}/{shown} | {peak:,.0f} |"
    )
    note = (
        f"At {stranger:.1f} ms measured, 28M strangers are {28e6 * stranger / 3.6e6:,.0f} core hours, decoding "
        "aside (its time is the scorers': benchmarks/results/data_scoring.md)."
    )
    return [head, "|" + "---:|" * 10, row, "", note]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pictures", nargs="*", type=Path, help="folders of pictures; default: what packages ship")
    parser.add_argument("--changed", type=int, default=400, help="pictures that are changed and looked for")
    parser.add_argument(
        "--pairs", type=Path, help="file for the pairs that raise an alarm (default: beside the folders)"
    )
    parser.add_argument("--entries", type=int, default=0, help="pieces in the index of the speed test; 0: none")
    parser.add_argument("--asked", type=int, default=100, help="pictures that are looked for in it")
    args = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as work:
        folders = args.pictures or [shipped_pictures(Path(work) / "shipped")]
        if not args.entries:
            counts = build_index(Path(work) / "against", find_sets(map(str, folders)))["contents"]
            index = ContaminationIndex(Path(work) / "against")
            lines = recall_table(index, folders, args.changed)
            kept = "; ".join(
                f"{name} {one['pictures']:,} ({one['skipped'].get('plain_image', 0):,} plain)"
                for name, one in counts.items()
            )
            lines += ["", f"Indexed: {kept}.", ""]
            print("\n".join(lines), flush=True)
            lines += false_alarms(index, args.pairs or folders[0].parent / "pairs.tsv")
        else:
            lines = speed(folders, args.entries, args.asked)
    name = "decontamination_speed" if args.entries else "decontamination"
    write_result(name, lines, describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
