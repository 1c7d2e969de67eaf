"""Decontamination: recall by kind of change and false alarms on real pictures, and speed on a large index.

Each folder of --pictures holds pictures of one kind, as files. A share of them is indexed; a sample of that is changed
in known ways and looked for; then all are strangers, each to all that are indexed but itself. An alarm for a picture
of another folder is false; one for a picture of its own folder may be the same drawing in another color: these pairs
are listed in the file of --pairs and left to the eye. Speed is measured on an index of --entries pieces of pictures.
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
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from PIL import Image
from report import describe_machine, write_result
from scipy.stats import beta

sys.path.insert(0, str(Path(__file__).parents[1]))
from open_qwen2vl.decontamination import index as indexing
from open_qwen2vl.decontamination.attacks import self_test
from open_qwen2vl.decontamination.index import ContaminationIndex, build_index, import_faiss
from open_qwen2vl.decontamination.pictures import Thumbnail
from open_qwen2vl.decontamination.sets import EvaluationSet
from open_qwen2vl.decontamination.views import Unlike, views
from open_qwen2vl.processing.images import decode_image

LIMIT = indexing.LIMITS["image"]
_LEAST = 10  # grey levels of an indexed piece (standard deviation)


def shipped_pictures(folder: Path) -> Path:
    """Real pictures that packages ship, as files."""
    from tests.decontamination.conftest import drawings, photographs

    folder.mkdir()
    for number, picture in enumerate(photographs() + drawings()):
        picture.save(folder / f"{number:03}.png")
    return folder


def indexed_sets(folders: list[Path], share: float) -> list[EvaluationSet]:
    """A share of the pictures of each folder, by a hash of their names."""
    return [
        EvaluationSet(
            folder.name, tuple(file for file in sorted(folder.iterdir()) if hashed(file.name) < share * 2**32), None
        )
        for folder in folders
    ]


def hashed(name: str) -> int:
    return crc32(name.encode())


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


class Looked(NamedTuple):
    """What became of some strangers."""

    seconds: float  # CPU
    plain: list[Path]
    alarms: list[tuple[Path, str, str, float]]  # folder and name that it is taken for, similarity


def look(against: Path, files: list[Path]) -> Looked:
    """Look for pictures in an index that may have each of them, but as another entry."""
    index, plain, alarms, started = ContaminationIndex(against), [], [], time.process_time()
    for file in files:
        try:
            like = index.similarities(decode_image(file.read_bytes()), sure=2.0)
        except Unlike:
            plain.append(file)
            continue
        for entry, value in like.items():
            if value >= LIMIT and index.names[entry] != [file.parent.name, file.name]:
                alarms.append((file, *index.names[entry], value))
    return Looked(time.process_time() - started, plain, alarms)


def false_alarms(against: Path, folders: list[Path], count: int, pairs: Path) -> list[str]:
    """How many strangers raise an alarm for a picture of another folder, and for one of their own."""
    files = sorted((file for folder in folders for file in folder.iterdir()), key=lambda file: hashed(file.name[::-1]))
    files, looked = files[:count], []
    parts = [files[start : start + 200] for start in range(0, len(files), 200)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool, pairs.open("w") as written:
        for one in pool.map(look, itertools.repeat(against), parts):
            looked.append(one)
            for file, folder, name, value in one.alarms:
                print(file.parent.name, file.name, folder, name, f"{value:.3f}", sep="\t", file=written, flush=True)
    strangers, plain = (Counter(file.parent.name for file in some) for some in (files, chain(looked, "plain")))
    alarms = {(file, folder == file.parent.name) for file, folder, *_ in chain(looked, "alarms")}
    false, own = (Counter(file.parent.name for file, is_own in alarms if is_own == wanted) for wanted in (False, True))
    rows = ["| strangers | looked for | plain | alarm for another kind | alarm for their own kind |"]
    rows += ["|---|---:|---:|---:|---:|"]
    rows += [
        f"| {name} | {strangers[name]:,} | {plain[name]:,} | {false[name]} | {own[name]:,} |"
        for name in sorted(strangers)
    ]
    total, wrong = len(files), false.total()
    rows += [f"| all | {total:,} | {plain.total():,} | {wrong} | {own.total():,} |", ""]
    seconds, upper = sum(one.seconds for one in looked), beta.ppf(0.95, wrong + 1, total - wrong)
    return [
        *rows,
        f"{wrong} of {total:,} raise an alarm for another kind: below {upper:.1e} with a confidence of 95 % "
        f"(Clopper-Pearson). {seconds / total * 1e3:.1f} CPU ms a stranger, decoding of 256 pixels included.",
    ]


def chain(looked: list[Looked], part: str) -> list:
    return list(itertools.chain.from_iterable(getattr(one, part) for one in looked))


def quarters(files: list[Path]) -> Iterator[tuple[Image.Image, Thumbnail]]:
    """The quarters of pictures of 256 pixels, and what the index keeps of them, without those of nearly one grey."""
    for file in files:
        image = decode_image(file.read_bytes()).resize((256, 256))
        pixels = np.asarray(image.convert("YCbCr"), np.float32)
        grey = pixels[..., 0].reshape(128, 2, 128, 2).mean((1, 3)).round().astype(np.uint8)
        color = pixels[..., 1:].reshape(32, 8, 32, 8, 2).mean((1, 3)).round().astype(np.uint8).transpose(2, 0, 1)
        for down, right in itertools.product((0, 1), repeat=2):
            own = grey[64 * down : 64 * down + 64, 64 * right : 64 * right + 64]
            if own.std() >= _LEAST:
                cut = image.crop((128 * right, 128 * down, 128 * right + 128, 128 * down + 128))
                yield cut, Thumbnail(own, color[:, 16 * down : 16 * down + 16, 16 * right : 16 * right + 16])


def build_large(files: list[Path], entries: int, asked: int, folder: Path) -> tuple[float, float, list]:
    """CPU seconds, MB of memory at the peak; crops of some pictures with their numbers.

    Each quarter is there four times, turned by 90, 180 and 270 degrees: these are not alike here.
    """
    started, copies = time.process_time(), []
    thumbnails, colors = np.empty((entries, 64, 64), np.uint8), np.empty((entries, 2, 16, 16), np.uint8)
    for number, (image, kept) in enumerate(itertools.islice(quarters(files), entries // 4)):
        for turn in range(4):
            thumbnails[4 * number + turn] = np.rot90(kept.grey, turn)
            colors[4 * number + turn] = np.rot90(kept.color, turn, (1, 2))
        if number % (entries // 8 // asked) == 0:
            copies.append((4 * number, image.crop((6, 9, 114, 119))))
    np.save(folder / "thumbnails.npy", thumbnails[: 4 * (number + 1)])
    np.save(folder / "colors.npy", colors[: 4 * (number + 1)])
    import_faiss().write_index(indexing.index_crops(thumbnails[: 4 * (number + 1)]), str(folder / "crops.faiss"))
    return time.process_time() - started, peak_memory(), copies


def ask_large(files: list[Path], asked: int, copies: list, folder: Path) -> list[list[float]]:
    """For some numbers of searched lists a row of the table."""
    faiss, rows = import_faiss(), []
    faiss.omp_set_num_threads(1)
    index = ContaminationIndex.__new__(ContaminationIndex)
    index.thumbnails, index.colors = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("thumbnails", "colors")
    )
    index.owners = np.arange(len(index.thumbnails))
    index._crops = faiss.read_index(str(folder / "crops.faiss"), faiss.IO_FLAG_MMAP)
    strangers = usable(enumerate(image for image, _ in quarters(files[::-1])), asked)
    copies = usable(copies, asked)
    for _, image in strangers[:20]:
        index.match_image(image)  # the file is read, tables are filled
    for searched in (4, 16):
        indexing._SEARCHED_WHOLE = searched
        started = time.process_time()
        alarms = sum(index.match_image(image).similarity >= LIMIT for _, image in strangers)
        stranger = (time.process_time() - started) / len(strangers)
        started = time.process_time()
        found = sum(index.match_image(image).entry == number for number, image in copies)
        copied = (time.process_time() - started) / len(copies)
        rows.append(
            [searched, stranger * 1e3, alarms, len(strangers), copied * 1e3, found, len(copies), peak_memory()]
        )
    return rows


def usable(images: Iterable[tuple[int, Image.Image]], count: int) -> list[tuple[int, Image.Image]]:
    """The first so many of those that show enough."""

    def shows_enough(numbered: tuple[int, Image.Image]) -> bool:
        with contextlib.suppress(Unlike):
            return bool(views(numbered[1]))
        return False

    return list(itertools.islice(filter(shows_enough, images), count))


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def speed(folders: list[Path], entries: int, asked: int) -> list[str]:
    """A table of an index of pieces of the pictures, made in one process and asked in another."""
    context = multiprocessing.get_context("spawn")
    files = sorted((file for folder in folders for file in folder.iterdir()), key=lambda file: hashed(file.name))
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        with ProcessPoolExecutor(1, context) as pool:
            seconds, built, copies = pool.submit(build_large, files, entries, asked, folder).result()
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        print(
            f"{entries:,} pictures: {seconds:.0f} CPU s, {built:,.0f} MB at the peak, {size:,.0f} on disk", flush=True
        )
        with ProcessPoolExecutor(1, context) as pool:
            rows = pool.submit(ask_large, files, asked, copies, folder).result()
    lines = [
        f"An index of {entries:,} pictures takes {seconds:.0f} CPU seconds, {built:,.0f} MB of memory at the peak and "
        f"{size:,.0f} MB on the disk, which are mapped and shared by the processes.",
        "",
        "| lists searched | ms a stranger | core hours for 28M | alarms | ms a copy | copies found | MB peak |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for searched, stranger, alarms, strangers, copied, found, copies, peak in rows:
        lines.append(
            f"| {searched} | {stranger:.1f} | {28e6 * stranger / 3.6e6:,.0f} | {alarms} of {strangers} | "
            f"{copied:.1f} | {found} of {copies} | {peak:,.0f} |"
        )
    return [
        *lines,
        "",
        "Lists are those of a whole picture. Decoding aside: its time is the scorers' (data_scoring.md).",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pictures", nargs="*", type=Path, help="folders of pictures; default: what packages ship")
    parser.add_argument("--changed", type=int, default=400, help="pictures that are changed and looked for")
    parser.add_argument("--indexed", type=float, default=1.0, help="share of the pictures that is indexed")
    parser.add_argument("--strangers", type=int, help="pictures that are looked for unchanged; default: all")
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
            counts = build_index(Path(work) / "against", indexed_sets(folders, args.indexed))["contents"]
            index = ContaminationIndex(Path(work) / "against")
            lines = recall_table(index, folders, args.changed)
            kept = "; ".join(
                f"{name} {one['pictures']:,} ({one['skipped'].get('plain_image', 0):,} plain)"
                for name, one in counts.items()
            )
            lines += ["", f"Indexed: {kept}.", ""]
            print("\n".join(lines), flush=True)
            pairs = args.pairs or folders[0].parent / "pairs.tsv"
            lines += false_alarms(Path(work) / "against", folders, args.strangers, pairs)
        else:
            lines = speed(folders, args.entries, args.asked)
    name = "decontamination_speed" if args.entries else "decontamination"
    write_result(name, lines, describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
