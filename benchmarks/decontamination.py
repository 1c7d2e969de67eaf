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
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
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
from open_qwen2vl.decontamination.sets import find_sets
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
        f"{wrong} of {total:,} raise an alarm for another kind: below {upper:.1e} with a confidence of 95 % "
        f"(Clopper-Pearson). "
        f"{seconds / total * 1e3:.1f} CPU ms a stranger, decoding of 256 pixels included.",
    ]


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
    for searched in (2, 4, 8):
        index._crops.nprobe = searched
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
    files = sorted(
        (file for folder in folders for file in folder.iterdir()), key=lambda file: crc32(file.name.encode())
    )
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
    return [*lines, "", "Decoding aside: its time is the scorers' (data_scoring.md)."]


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
