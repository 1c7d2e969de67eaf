"""All evaluation pictures and texts in a folder, written once; workers map it and ask it for each sample.

thumbnails.npy  uint8 (pictures and what is inside their frames, 64, 64)     owners.npy  the entry of each
crops.faiss     coarse vectors of each thumbnail's crops, 8 bits a number    names.json  set, name of each entry
ngrams.npz      of the texts                                                 index.json  what it was made from

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
from .pictures import COARSE, COARSE_SIZE, FINE, Interval, Window
from .sets import Entry, EvaluationSet, describe_set, picture_columns, read_set
from .texts import TextIndex, index_texts

LIMITS = {part: float(limit) for part, limit in CONTAMINATED}  # of similarity; from there `contaminated()` is true
DECODED_SIZE = (256, 256)
PLAIN = "plain_image"
_HALVES = (Interval(0, 0.5), Interval(0.5, 1))
QUARTERS = tuple(Window(x, y) for x in _HALVES for y in _HALVES)
CROPS = (*pictures.WINDOWS, *QUARTERS)
_WHOLE = Window(Interval(0, 1), Interval(0, 1))
_MIN_DETAIL, _MIN_QUARTER_DETAIL = 8.0, 16.0  # below, skies and gradients are all alike
_NEAREST, _COMPARED = 24, 24  # crops of a view; thumbnails in all
_MIN_COARSE, _MIN_FIRST, _OUTSIDE = 0.72, 0.2, 0.05
_SURE = 0.98  # no other candidate is looked at
_FLAT_CROPS = 500_000  # above, crops lie in lists, of which some are searched
_LISTS, _SEARCHED, _TRAINED_ON = 4096, 32, 160_000
_THUMBNAILS_AT_ONCE = 2048
_PARTS = {"sets", "contents", "texts_left_out", "files"}  # of index.json


class Match(NamedTuple):
    """The evaluation picture or text that is nearest to a sample's."""

    similarity: float  # 0 to 1
    entry: int  # -1 where there is none


class Unlike(SampleError):
    """A picture that cannot be told from others."""


class ContaminationIndex:
    """An index that [`build_index`] wrote, for one process; a `ValueError` that names the file if one is damaged."""

    def __init__(self, folder: Path):
        faiss = import_faiss()
        faiss.omp_set_num_threads(1)  # a process for each core looks through a tar
        sizes = _read_json(folder, "index.json", dict)["files"]
        with _whole(folder / "thumbnails.npy", sizes) as path:
            self.thumbnails = np.load(path, mmap_mode="r")
        with _whole(folder / "owners.npy", sizes) as path:
            self.owners = np.load(path)
        with _whole(folder / "crops.faiss", sizes) as path:
            self._crops = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        with _whole(folder / "ngrams.npz", sizes) as path, np.load(path) as arrays:
            self._texts = TextIndex(arrays["hashes"], arrays["owners"], arrays["sizes"])
            self._text_owners = arrays["text_owners"]
        with _whole(folder / "names.json", sizes):
            self.names: list[list[str]] = _read_json(folder, "names.json", list)

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
        views = _views(pictures.thumbnails(image))
        found: dict[int, float] = {}
        for thumbnail, window, whole in self._candidates(views):
            pixels = self.thumbnails[thumbnail].astype(np.float32)
            wanted, _ = pictures.fine(whole)
            first, _ = pictures.fine(pictures.transform(pixels, window, FINE))
            if first @ wanted < _MIN_FIRST:
                continue
            _, fitted = pictures.best_fit(pixels, window, wanted)
            similarity = min(max(pictures.agreement(whole, fitted), 0.0), 1.0)
            entry = int(self.owners[thumbnail])
            found[entry] = max(found.get(entry, 0.0), similarity)
            if similarity >= sure:
                break
        return found

    def _candidates(self, views: "list[_View]") -> Iterator[tuple[int, Window, np.ndarray]]:
        """Thumbnails that have a crop like a view, the likest first; the crop that the whole picture then is of it."""
        if not len(self.thumbnails):
            return
        asked = pictures.coarse(np.stack([view.transform[:COARSE, :COARSE] for view in views]))
        cosines, crops = self._crops.search(np.ascontiguousarray(asked, np.float32), _NEAREST)
        likest: dict[tuple[int, int], tuple[float, int]] = {}  # view and thumbnail: its crop
        for number, (near, rows) in enumerate(zip(cosines.tolist(), crops.tolist(), strict=True)):
            for cosine, row in zip(near, rows, strict=True):
                if row >= 0 and cosine >= _MIN_COARSE:
                    thumbnail, crop = divmod(row, len(CROPS))
                    likest.setdefault((number, thumbnail), (cosine, crop))
        ordered = sorted(likest.items(), key=lambda item: (-item[1][0], item[0]))
        for (number, thumbnail), (_, crop) in ordered[:_COMPARED]:
            window = Window(*map(_extended, CROPS[crop], views[number].window))
            if all(-_OUTSIDE <= edge <= 1 + _OUTSIDE for interval in window for edge in interval):
                yield thumbnail, window, views[number].whole


@contextlib.contextmanager
def _whole(path: Path, sizes: dict[str, int] | None = None) -> Iterator[Path]:
    """Read a file of an index: a `ValueError` that names it if it is missing, of another size or damaged.

    Sizes are compared first: to touch what was cut from a mapped file would end the process.
    """
    try:
        if not path.is_file() or (sizes is not None and path.stat().st_size != sizes[path.name]):
            raise ValueError("missing or cut")
        yield path
    except (ValueError, LookupError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged or missing; delete {path.parent} to make it again") from error


def _read_json(folder: Path, name: str, kind: type) -> Any:
    with _whole(folder / name) as path:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, kind) or (kind is dict and not _PARTS <= content.keys()):
            raise ValueError("not as it was written")
        return content


class _View(NamedTuple):
    """A part of a picture that is looked for."""

    window: Window  # which part
    transform: np.ndarray  # float32 (16, 16), of it
    whole: np.ndarray  # of the whole picture


def _extended(interval: Interval, part: Interval) -> Interval:
    """Where a whole axis lies, if a part of it lies at an interval."""
    scale = (interval.stop - interval.start) / (part.stop - part.start)
    start = interval.start - part.start * scale
    return Interval(start, start + scale)


def _views(thumbnails: np.ndarray) -> list[_View]:
    """A picture, what is inside its frame, its quarters, and all of them mirrored."""
    if not len(thumbnails):
        raise Unlike(PLAIN, "the picture is of one grey")
    plain = [_View(_WHOLE, whole, whole) for whole in pictures.transform(thumbnails, _WHOLE, FINE)]
    for quarter in QUARTERS:  # a text or logo leaves some of them alone
        plain.append(_View(quarter, pictures.transform(thumbnails[0], quarter, FINE), plain[0].whole))
    details = [(view, pictures.fine(view.transform)[1]) for view in plain]
    views = [
        view for view, detail in details if detail >= (_MIN_DETAIL if view.window == _WHOLE else _MIN_QUARTER_DETAIL)
    ]
    if not views or max(pictures.shown_blocks(view.whole) for view in views) < pictures.MIN_BLOCKS:
        raise Unlike(PLAIN, "the picture shows too little to be told from others")
    return [*views, *map(_mirrored, views)]


def _mirrored(view: _View) -> _View:
    signs = (-1.0) ** np.arange(FINE, dtype=np.float32)  # of horizontal frequencies
    start, stop = view.window.x
    return _View(Window(Interval(1 - stop, 1 - start), view.window.y), view.transform * signs, view.whole * signs)


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
        made = _read_json(folder, "index.json", dict)
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
        thumbnails = np.stack(contents.thumbnails) if contents.thumbnails else np.empty((0, 64, 64), np.uint8)
        np.save(temporary / "thumbnails.npy", thumbnails)
        np.save(temporary / "owners.npy", np.array(contents.owners, np.int64))
        (temporary / "names.json").write_text(json.dumps(contents.names, ensure_ascii=False), encoding="utf-8")
        faiss.write_index(index_crops(thumbnails), str(temporary / "crops.faiss"))
        texts, left_out = index_texts(contents.texts)
        np.savez(temporary / "ngrams.npz", text_owners=np.array(contents.text_owners, np.int64), **texts._asdict())
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        made = {"sets": described, "contents": contents.counts, "texts_left_out": left_out, "files": sizes}
        (temporary / "index.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return made


class _Contents:
    """What the sets hold, as it is gathered."""

    def __init__(self):
        self.thumbnails: list[np.ndarray] = []
        self.owners: list[int] = []
        self.names: list[list[str]] = []
        self.texts: list[str] = []
        self.text_owners: list[int] = []
        self.counts: dict[str, dict[str, Any]] = {}

    def add(self, each: EvaluationSet) -> None:
        """Read a set; a `ValueError` if it has columns of pictures and none could be read."""
        pictures_seen, texts_before, skipped, first = 0, len(self.texts), Counter(), ""
        for entry in read_set(each):
            if isinstance(entry, SampleError):
                skipped[entry.reason] += 1
                first = first or str(entry)
                continue
            self.names.append([each.name, entry.name])
            for image in entry.images:
                try:
                    self._add_picture(image)
                    pictures_seen += 1
                except SampleError as error:
                    skipped[error.reason] += 1
                    first = first or f"{entry.name}: {error}"
            self._add_texts(entry)
        if not pictures_seen and not skipped[PLAIN] and (columns := picture_columns(each)):
            why = ", ".join(f"{reason} {count:,}" for reason, count in sorted(skipped.items()))
            raise ValueError(
                f"--against {each.name}: no picture could be read, with the column {columns[0]}: "
                f"{why or 'all cells are empty'}{first and f' ({first})'}"
            )
        self.counts[each.name] = {
            "pictures": pictures_seen,
            "texts": len(self.texts) - texts_before,
            "skipped": dict(sorted(skipped.items())),
        }

    def _add_picture(self, image: bytes | Image.Image) -> None:
        image = decode_image(image, DECODED_SIZE) if isinstance(image, bytes) else to_rgb(image)
        found = pictures.thumbnails(image)
        _views(found)  # raises where there is too little to see
        self.thumbnails += list(np.round(found).astype(np.uint8))
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
    if count > _FLAT_CROPS:
        index.nprobe = _SEARCHED
    return index


def _crop_vectors(thumbnails: np.ndarray, step: int = 1) -> np.ndarray:
    """Coarse vectors `(thumbnails * crops, 64)`, or one in `step` of them."""
    pixels = thumbnails.astype(np.float32)
    vectors = np.empty((len(pixels), len(CROPS), COARSE_SIZE), np.float32)
    for number, crop in enumerate(CROPS):
        vectors[:, number] = pictures.coarse(pictures.transform(pixels, crop, COARSE))
    return vectors.reshape(-1, COARSE_SIZE)[::step]
