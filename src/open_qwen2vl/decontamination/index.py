"""All evaluation pictures and texts in a folder, written once; workers map it and ask it for each sample.

thumbnails.npy  uint8 (pictures and what is inside their frames, 64, 64)     owners.npy  the entry of each
colors.npy      uint8 (the same, 2, 16, 16)                                  names.json  set, name of each entry
crops.faiss     coarse vectors of each thumbnail's crops, 8 bits a number    index.json  what it was made from
ngrams.npz      of the texts

`index.json` is read by a rerun, which refuses an index of other sets.
"""

import contextlib
import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..data.filtering.expression import CONTAMINATED
from ..files import new_folder
from ..processing.images import decode_image, to_rgb
from ..processing.sample_error import SampleError
from . import pictures
from .pictures import COARSE, COARSE_SIZE, COLOR_SIDE, FINE, SIDE, WHOLE, Thumbnail, Window
from .sets import Entry, EvaluationSet, describe_set, picture_columns, read_set
from .texts import TextIndex, index_texts
from .verification import similarity
from .views import CROPS, PLAIN, View, told_apart, views

ALGORITHM = "crops-64x64-dct-2/13-grams"  # another one wherever crops, limits or the comparison change
LIMITS = {part: float(limit) for part, limit in CONTAMINATED}  # of similarity; from there `contaminated()` is true
DECODED_SIZE = (256, 256)
_NEAREST, _COMPARED = 24, 24  # crops of a view; thumbnails in all
_FIRST = 12  # frequencies of an axis by which those are chosen: higher ones lie elsewhere before a crop is fitted
_MIN_COARSE, _MIN_FIRST, _OUTSIDE = 0.72, 0.25, 0.05
_SURE = 0.98  # no other candidate is looked at
_FLAT_CROPS = 500_000  # above, crops lie in lists, of which some are searched
_LISTS, _TRAINED_ON = 1024, 160_000
_SEARCHED, _SEARCHED_WHOLE = 4, 16  # lists for a quarter; for a whole picture, which is how a crop is found
_THUMBNAILS_AT_ONCE = 2048
_PARTS = {"sets", "contents", "texts_left_out", "files"}  # of index.json


class Match(NamedTuple):
    """The evaluation picture or text that is nearest to a sample's."""

    similarity: float  # 0 to 1
    entry: int  # -1 where there is none


class ContaminationIndex:
    """An index that [`build_index`] wrote, for one process; a `ValueError` that names the file if one is damaged."""

    def __init__(self, folder: Path):
        faiss = import_faiss()
        faiss.omp_set_num_threads(1)  # a process for each core looks through a tar
        sizes = read_part(folder, "index.json", dict)["files"]
        with whole_file(folder / "thumbnails.npy", sizes) as path:
            self.thumbnails = np.load(path, mmap_mode="r")
        with whole_file(folder / "colors.npy", sizes) as path:
            self.colors = np.load(path, mmap_mode="r")
        with whole_file(folder / "owners.npy", sizes) as path:
            self.owners = np.load(path)
        with whole_file(folder / "crops.faiss", sizes) as path:
            self._crops = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        with whole_file(folder / "ngrams.npz", sizes) as path, np.load(path) as arrays:
            self._texts = TextIndex(arrays["hashes"], arrays["owners"], arrays["sizes"])
            self._text_owners = arrays["text_owners"]
        with whole_file(folder / "names.json", sizes):
            self.names: list[list[str]] = read_part(folder, "names.json", list)

    def match_text(self, text: str) -> Match:
        """The evaluation text of which most is in a text."""
        share, number = self._texts.best(text)
        return Match(share, int(self._text_owners[number]) if number >= 0 else -1)

    def match_image(self, image: Image.Image) -> Match:
        """The evaluation picture that a picture is most likely a copy of; `Unlike` if it shows too little."""
        found = self.similarities(image)
        entry = max(found, key=lambda entry: (found[entry], -entry), default=-1)
        return Match(found.get(entry, 0.0), entry)

    def similarities(self, image: Image.Image, sure: float = _SURE) -> dict[int, float]:
        """Similarity, 0 to 1, of each evaluation picture that may be the same; `Unlike` if it shows too little."""
        found: dict[int, float] = {}
        for row, window, view in self._candidates(views(image)):
            thumbnail = Thumbnail(self.thumbnails[row], self.colors[row])
            wanted, _ = pictures.fine(view.whole.grey[:FINE, :FINE])
            fitted, window = pictures.best_fit(thumbnail.grey.astype(np.float32), window, wanted)
            if fitted < pictures.MIN_FITTED:
                continue
            entry = int(self.owners[row])
            found[entry] = max(found.get(entry, 0.0), similarity(view.whole, thumbnail, window))
            if found[entry] >= sure:
                break
        return found

    def like(self, image: Image.Image) -> set[int]:
        """The entries that a picture is taken for: all candidates are compared; `Unlike` if it shows too little."""
        found = self.similarities(image, sure=2.0)
        return {entry for entry, value in found.items() if value >= LIMITS["image"]}

    def _candidates(self, asked: list[View]) -> list[tuple[int, Window, View]]:
        """Thumbnails that have a crop like a view, the likest first; the crop that the whole picture then is of it."""
        if not len(self.thumbnails):
            return []
        cosines, crops = self._nearest(asked)
        likest: dict[tuple[int, int], Window] = {}  # view and thumbnail: where the whole picture is in it
        for number, (near, rows) in enumerate(zip(cosines.tolist(), crops.tolist(), strict=True)):
            for cosine, row in zip(near, rows, strict=True):
                thumbnail, crop = divmod(row, len(CROPS))
                if row >= 0 and cosine >= _MIN_COARSE and (number, thumbnail) not in likest:
                    likest[number, thumbnail] = asked[number].place_of_whole(CROPS[crop])
        return self._likest(
            asked,
            {
                key: window
                for key, window in likest.items()
                if all(-_OUTSIDE <= edge <= 1 + _OUTSIDE for interval in window for edge in interval)
            },
        )

    def _nearest(self, asked: list[View]) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and numbers of the crops that are nearest to each view, `(views, 24)`; -1 where there are fewer."""
        vectors = pictures.coarse(np.stack([view.transform[:COARSE, :COARSE] for view in asked])).astype(np.float32)
        is_whole = np.array([view.window == WHOLE for view in asked])
        cosines, crops = (np.empty((len(asked), _NEAREST), kind) for kind in (np.float32, np.int64))
        for chosen, lists in ((is_whole, _SEARCHED_WHOLE), (~is_whole, _SEARCHED)):
            if hasattr(self._crops, "nprobe"):  # a small index has no lists
                self._crops.nprobe = lists
            if chosen.any():
                cosines[chosen], crops[chosen] = self._crops.search(vectors[chosen], _NEAREST)
        return cosines, crops

    def _likest(self, asked: list[View], windows: dict[tuple[int, int], Window]) -> list[tuple[int, Window, View]]:
        """Those that more frequencies are like as well, before they are moved to where they fit."""
        if not windows:
            return []
        numbers, rows = np.array(list(windows)).T
        edges = np.stack([pictures.in_steps(window) for window in windows.values()])  # (candidates, 2, 2)
        across, down = (pictures.cosines(edges[:, axis], _FIRST) for axis in (0, 1))
        vectors, _ = pictures.fine(down @ self.thumbnails[rows].astype(np.float32) @ across.mT)
        wholes, _ = pictures.fine(np.stack([view.whole.grey[:_FIRST, :_FIRST] for view in asked]))
        alike = (vectors * wholes[numbers]).sum(axis=1)
        order = np.argsort(-alike, kind="stable")[:_COMPARED]
        chosen, places = order[alike[order] >= _MIN_FIRST], list(windows.values())
        return [(int(rows[n]), places[n], asked[numbers[n]]) for n in chosen]


@contextlib.contextmanager
def whole_file(path: Path, sizes: dict[str, int] | None = None) -> Iterator[Path]:
    """Read a file of an index: a `ValueError` that names it if it is missing, of another size or damaged.

    Sizes are compared first: to touch what was cut from a mapped file would end the process.
    """
    try:
        if not path.is_file() or (sizes is not None and path.stat().st_size != sizes[path.name]):
            raise ValueError("missing or cut")
        yield path
    except (ValueError, LookupError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged or missing; delete {path.parent} to make it again") from error


def read_part(folder: Path, name: str, kind: type, parts: set[str] = _PARTS) -> Any:
    """A json file of an index; a `ValueError` that names it if it is damaged, or an object without some parts."""
    with whole_file(folder / name) as path:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, kind) or (kind is dict and not parts <= content.keys()):
            raise ValueError("not as it was written")
        return content


def import_faiss() -> Any:
    """The library, or a `ValueError` that names the extra."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError('this needs faiss: pip install "open-qwen2vl[curate]"') from error
    return faiss


def build_index(folder: Path, sets: Sequence[EvaluationSet]) -> dict[str, Any]:
    """Write an index, or find that it is there; what is in it by set, as `index.json` has it.

    A `ValueError` if it was made from something else.
    """
    described = [describe_set(each, folder) for each in sets]
    if folder.exists():
        made = read_part(folder, "index.json", dict)
        if (before := made.get("algorithm", "an older version")) != ALGORITHM:
            raise ValueError(f"{folder}: made by {before}, now {ALGORITHM}: choose another --output")
        if made["sets"] != described:
            raise ValueError(f"{folder}: made from other sets, or they have changed: choose another --output")
        return made
    faiss = import_faiss()
    contents = _Contents()
    for each in sets:
        contents.add(each)
    if not contents.thumbnails and not contents.texts:
        raise ValueError(f"--against: nothing to compare with in {', '.join(each.name for each in sets)}")
    with new_folder(folder) as temporary:
        thumbnails = np.array([kept.grey for kept in contents.thumbnails], np.uint8).reshape(-1, SIDE, SIDE)
        colors = np.array([kept.color for kept in contents.thumbnails], np.uint8).reshape(
            -1, 2, COLOR_SIDE, COLOR_SIDE
        )
        np.save(temporary / "thumbnails.npy", thumbnails)
        np.save(temporary / "colors.npy", colors)
        np.save(temporary / "owners.npy", np.array(contents.owners, np.int64))
        (temporary / "names.json").write_text(json.dumps(contents.names, ensure_ascii=False), encoding="utf-8")
        faiss.write_index(index_crops(thumbnails), str(temporary / "crops.faiss"))
        texts, left_out = index_texts(contents.texts)
        np.savez(temporary / "ngrams.npz", text_owners=np.array(contents.text_owners, np.int64), **texts._asdict())
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        made = {"algorithm": ALGORITHM, "sets": described, "contents": contents.counts}
        made |= {"texts_left_out": left_out, "files": sizes}
        (temporary / "index.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return made


class _Contents:
    """What the sets hold, as it is gathered."""

    def __init__(self):
        self.thumbnails: list[Thumbnail] = []
        self.owners: list[int] = []
        self.names: list[list[str]] = []
        self.texts: list[str] = []
        self.text_owners: list[int] = []
        self.counts: dict[str, dict[str, Any]] = {}

    def add(self, each: EvaluationSet) -> None:
        """Read a set; a `ValueError` if it has columns of pictures and none could be read."""
        pictures_seen, texts_before, skipped, examples = 0, len(self.texts), Counter(), {}
        for entry in read_set(each):
            if isinstance(entry, SampleError):
                skipped[entry.reason] += 1
                examples.setdefault(entry.reason, str(entry))
                continue
            self.names.append([each.name, entry.name])
            for image in entry.images:
                try:
                    self._add_picture(image)
                    pictures_seen += 1
                except SampleError as error:
                    skipped[error.reason] += 1
                    examples.setdefault(error.reason, f"{entry.name}: {error}")
            self._add_texts(entry)
        if not pictures_seen and not skipped[PLAIN] and (columns := picture_columns(each)):
            why = ", ".join(f"{reason} {count:,} ({examples[reason]})" for reason, count in sorted(skipped.items()))
            raise ValueError(
                f"--against {each.name}: no picture could be read, with the column {columns[0]}: "
                f"{why or 'all cells are empty'}"
            )
        self.counts[each.name] = {
            "pictures": pictures_seen,
            "texts": len(self.texts) - texts_before,
            "skipped": dict(sorted(skipped.items())),
            "examples": examples,
        }

    def _add_picture(self, image: bytes | Image.Image) -> None:
        image = decode_image(image, DECODED_SIZE) if isinstance(image, bytes) else to_rgb(image)
        found = [thumbnail for thumbnail, _ in told_apart(image)]
        self.thumbnails += found
        self.owners += [len(self.names) - 1] * len(found)

    def _add_texts(self, entry: Entry) -> None:
        self.texts += entry.texts
        self.text_owners += [len(self.names) - 1] * len(entry.texts)


def index_crops(thumbnails: np.ndarray) -> Any:
    """A faiss index of the crops of thumbnails uint8 `(n, 64, 64)`: number `thumbnail * len(CROPS) + crop`."""
    faiss = import_faiss()
    count = len(thumbnails) * len(CROPS)
    kind = "SQ8" if count <= _FLAT_CROPS else f"IVF{_LISTS},SQ8"
    index = faiss.index_factory(COARSE_SIZE, kind, faiss.METRIC_INNER_PRODUCT)
    if len(thumbnails):
        chosen = np.unique(np.linspace(0, len(thumbnails) - 1, min(len(thumbnails), _TRAINED_ON // 32)).astype(int))
        index.train(_crop_vectors(thumbnails[chosen], step=max(1, len(chosen) * len(CROPS) // _TRAINED_ON)))
    for start in range(0, len(thumbnails), _THUMBNAILS_AT_ONCE):
        index.add(_crop_vectors(thumbnails[start : start + _THUMBNAILS_AT_ONCE]))
    return index


def _crop_vectors(thumbnails: np.ndarray, step: int = 1) -> np.ndarray:
    """Coarse vectors `(thumbnails * crops, 64)`, or one in `step` of them."""
    pixels = thumbnails.astype(np.float32)
    vectors = np.empty((len(pixels), len(CROPS), COARSE_SIZE), np.float32)
    for number, crop in enumerate(CROPS):
        vectors[:, number] = pictures.coarse(pictures.transform(pixels, crop, COARSE))
    return vectors.reshape(-1, COARSE_SIZE)[::step]
