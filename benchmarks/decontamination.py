"""Decontamination: recall and precision by kind of change on real pictures, false alarms on others, and speed.

--pictures are evaluation pictures (a folder); without it the pieces of scikit-learn's two photographs and OpenMoji's
drawings. --others are pictures that are in no evaluation set, each of which that is taken for one is a false alarm.
Speed is measured on an index of made thumbnails whose spectrum falls as that of photographs. Prints tables and writes
them to benchmarks/results/decontamination.md.

    OMP_NUM_THREADS=1 python benchmarks/decontamination.py --pictures photos/ --others clipart/ --entries 20000
"""

import argparse
import resource
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from report import describe_machine, write_result

sys.path.insert(0, str(Path(__file__).parents[1]))
from open_qwen2vl.decontamination import index as indexing
from open_qwen2vl.decontamination import pictures
from open_qwen2vl.decontamination.attacks import clean_alarms, self_test
from open_qwen2vl.decontamination.index import ContaminationIndex, build_index, import_faiss
from open_qwen2vl.decontamination.sets import find_sets, read_set
from open_qwen2vl.processing.images import decode_image
from open_qwen2vl.processing.sample_error import SampleError

RICH = 40  # detail of a picture that is no sky, gradient or flat drawing


def shipped_pictures(folder: Path) -> Path:
    """Real pictures that packages ship, as files."""
    from tests.decontamination.conftest import drawings, photographs

    folder.mkdir()
    for number, picture in enumerate(photographs() + drawings()):
        picture.save(folder / f"{number:03}.png")
    return folder


def detail_of(image: Image.Image) -> float:
    """How much a picture shows: a smooth sky has 10, a photograph of a street 100 and more."""
    whole = pictures.transform(pictures.thumbnails(image)[0], indexing.CROPS[0], pictures.FINE)
    return float(pictures.fine(whole)[1])


def recall_table(index: ContaminationIndex, samples: list[tuple[int, Image.Image]]) -> list[str]:
    rich = [(entry, image) for entry, image in samples if detail_of(image) >= RICH]
    rows = [f"| change | pictures | recall | precision | of detail {RICH} and more | recall | precision |"]
    rows.append("|---|---:|---:|---:|---:|---:|---:|")
    for one, other in zip(self_test(index, samples), self_test(index, rich), strict=True):
        cells = [f"{each.pictures} | {each.recall:.4f} | {each.precision:.4f}" for each in (one, other)]
        rows.append(f"| {one.kind} | {' | '.join(cells)} |")
    return [*rows, "", f"{len(clean_alarms(index, samples))} pairs of them are alike unchanged."]


def false_alarms(index: ContaminationIndex, folder: str, rich: set[int]) -> str:
    looked = plain = 0
    wrong = []
    for each in find_sets([folder]):
        for entry in read_set(each):
            try:
                match = index.match_image(decode_image(entry.images[0], indexing.DECODED_SIZE))
            except SampleError as error:
                plain += error.reason == indexing.PLAIN
                continue
            looked += 1
            if match.similarity >= indexing.LIMITS["image"]:
                wrong.append(match.entry)
    return (
        f"Of {looked:,} pictures in {Path(folder).name} ({plain:,} plain ones aside) {len(wrong)} raise an alarm, "
        f"{len(rich & set(wrong))} of them for a picture of detail {RICH} and more."
    )


def made_thumbnails(count: int, seed: int) -> np.ndarray:
    """Noise of the spectrum of photographs, uint8 `(count, 64, 64)`."""
    random = np.random.default_rng(seed)
    distance = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64)[None])
    found = np.empty((count, 64, 64), np.uint8)
    for start in range(0, count, 1024):
        part = random.standard_normal((min(1024, count - start), 64, 64))
        smooth = np.fft.irfft2(np.fft.rfft2(part) / np.maximum(distance, 1 / 64), (64, 64))
        found[start : start + 1024] = np.clip(128 + 50 * smooth / smooth.std((1, 2), keepdims=True), 0, 255)
    return found


def speed(entries: int, asked: int) -> list[str]:
    """An index of made thumbnails; strangers and crops to 85 % are looked for in it."""
    faiss = import_faiss()
    thumbnails = made_thumbnails(entries, 0)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        crops = indexing.index_crops(thumbnails)
        built = time.process_time() - started
        path = Path(folder) / "crops.faiss"
        faiss.write_index(crops, str(path))
        size = path.stat().st_size
        del crops
        index = ContaminationIndex.__new__(ContaminationIndex)
        index.thumbnails, index.owners = thumbnails, np.arange(entries)
        index._crops = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        faiss.omp_set_num_threads(1)
        strangers = [Image.fromarray(one).resize((384, 384)) for one in made_thumbnails(asked, 1)]
        started = time.process_time()
        alarms = sum(index.match_image(one).similarity >= indexing.LIMITS["image"] for one in strangers)
        clean = (time.process_time() - started) / asked
        chosen = np.linspace(0, entries - 1, asked).astype(int)
        copies = [Image.fromarray(thumbnails[n]).resize((384, 384)).crop((20, 30, 346, 356)) for n in chosen]
        started = time.process_time()
        found = sum(index.match_image(one).entry == n for one, n in zip(copies, chosen, strict=True))
        copied = (time.process_time() - started) / asked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    bytes_each = (size + thumbnails.nbytes) / entries
    head = "| pictures | crops | CPU s to index | MB | ms a stranger | alarms | ms a copy | found | MB peak |"
    row = (
        f"| {entries:,} | {entries * len(indexing.CROPS):,} | {built:.0f} | {(size + thumbnails.nbytes) / 1e6:,.0f} | "
        f"{clean * 1e3:.1f} | {alarms}/{asked} | {copied * 1e3:.1f} | {found}/{asked} | {peak:,.0f} |"
    )
    note = (
        f"{bytes_each:,.0f} bytes a picture: 100,000 are {bytes_each * 1e5 / 1e6:,.0f} MB on the disk, mapped and "
        f"shared by the processes. At {clean * 1e3:.1f} ms 28M pictures are {28e6 * clean / 3600:,.0f} core hours "
        "against this index (searching grows with it: 32 of 4,096 lists), decoding aside (its time is the "
        "scorers': benchmarks/results/data_scoring.md)."
    )
    return [head, "|" + "---:|" * 9, row, "", note]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pictures", help="folder of evaluation pictures; default: those that packages ship")
    parser.add_argument("--others", nargs="*", default=[], help="folders of pictures that are in no set")
    parser.add_argument("--entries", type=int, default=20_000, help="made evaluation pictures of the speed test")
    parser.add_argument("--asked", type=int, default=200, help="pictures that are looked for in it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = args.pictures or str(shipped_pictures(Path(folder) / "pictures"))
        sets = find_sets([place])
        build_index(Path(folder) / "against", sets)
        index = ContaminationIndex(Path(folder) / "against")
        usable = set(np.unique(index.owners).tolist())
        images = [decode_image(entry.images[0]) for entry in read_set(sets[0])]
        samples = [(number, image) for number, image in enumerate(images) if number in usable]
        lines = recall_table(index, samples)
        lines[-1] = f"{len(images) - len(samples)} of {len(images)} pictures are plain. {lines[-1]}"
        rich = {entry for entry, image in samples if detail_of(image) >= RICH}
        lines += [false_alarms(index, other, rich) for other in args.others]
        print("\n".join(lines), flush=True)
    lines += ["", *speed(args.entries, args.asked)]
    write_result("decontamination", lines, describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
