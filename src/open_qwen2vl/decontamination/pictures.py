"""Is one picture a copy of another: re-encoded, resized, cropped, mirrored, framed, grey or written on?

    image ── 256x256 ── views: whole, without its frame, both mirrored ── grey 64x64, color 16x16 ── cosine transform
    coarse (64,): frequencies below 8      finds candidates among the crops of the evaluation pictures
    fine (250,): frequencies below 16      moves the candidate's crop until it fits best
    64 blocks (verification.py)            which are alike, or show something else

A crop is an interval of each axis: its transform is that of the whole thumbnail's pixels by cosines that are stretched
over the interval, so no crop is ever resized. Frequencies are weighted by what undoes their fall in photographs; the
lowest, which smooth skies and gradients share, count in the candidates alone.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE, COARSE, FINE, FINEST = 64, 8, 16, 32  # pixels of a thumbnail; frequencies of an axis
STEPS = 200  # of a side, by which crops are moved
COLOR_SIDE = 16  # pixels of a thumbnail's color
COARSE_SIZE = COARSE**2  # a number of which libraries compare 16 at a time
LENGTHS = (1.0, 0.925, 0.85, 0.775, 0.7)  # of indexed crops, in parts of a side
_STEP, _MOST_STRETCH = 0.075, 0.08  # between crops; by which a crop's sides may differ
_PIXELS = 256  # of a side, in which frames are looked for
_FRAME_RANGE, _SMALLEST_INSIDE = 12, 0.3  # grey levels within a line of a frame; part of a side that a picture keeps
_LOWEST_FINE = 3
MIN_FITTED = 0.6  # cosine of a crop, once it has been moved at all
_MOVES = (8, 4, 2)  # of a crop's edges, in steps
NUDGES = np.array(list(itertools.product((-1, 0, 1), repeat=2)))  # of both edges


class Interval(NamedTuple):
    """A part of an axis."""

    start: float
    stop: float


class Window(NamedTuple):
    """A crop of a picture."""

    x: Interval
    y: Interval


WHOLE = Window(Interval(0, 1), Interval(0, 1))


def _intervals(length: float) -> list[Interval]:
    starts = np.linspace(0, 1 - length, round((1 - length) / _STEP) + 1)
    return [Interval(float(start), float(start) + length) for start in starts]


WINDOWS = tuple(
    Window(x, y)
    for wide, high in itertools.product(LENGTHS, LENGTHS)
    if abs(wide - high) <= _MOST_STRETCH
    for x, y in itertools.product(_intervals(wide), _intervals(high))
)


class Thumbnail(NamedTuple):
    """What is kept of a picture."""

    grey: np.ndarray  # uint8 (64, 64)
    color: np.ndarray  # uint8 (2, 16, 16): blue and red differences as of JPEG, 128 for grey


def thumbnails(image: Image.Image) -> list[Thumbnail]:
    """Thumbnails of the picture, and of what is inside its frame if it has one."""
    pixels = image.resize((_PIXELS, _PIXELS), Image.Resampling.BOX).convert("YCbCr")
    grey, *color = pixels.split()
    found = []
    for box in [(0, 0, _PIXELS, _PIXELS), *_inside_of_frame(np.asarray(grey, np.int16))]:
        small = [one.resize((COLOR_SIDE, COLOR_SIDE), Image.Resampling.BOX, box) for one in color]
        found.append(Thumbnail(np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX, box)), np.stack(small)))
    return found


def _inside_of_frame(grey: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of what plain lines at the edges leave, if they leave neither all nor too little."""
    rows, columns = (np.flatnonzero(np.ptp(grey, axis=axis) > _FRAME_RANGE) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return []
    # Half of the outermost pixels may be of the frame.
    first = [int(found[0]) + (found[0] > 0) for found in (columns, rows)]
    last = [int(found[-1]) + (found[-1] == _PIXELS - 1) for found in (columns, rows)]
    sides = [stop - start for start, stop in zip(first, last, strict=True)]
    if min(sides) < _SMALLEST_INSIDE * _PIXELS or max(_PIXELS - side for side in sides) <= 4:
        return []
    return [(*first, *last)]


def transform(thumbnail: np.ndarray, window: Window, size: int) -> np.ndarray:
    """Cosine transform of a crop of thumbnails `(..., 64, 64)`: `(..., size, size)`, vertical frequencies first."""
    across, down = (_cosines(interval)[:size] for interval in window)
    return down @ thumbnail @ across.T


def cosines(intervals: np.ndarray, size: int) -> np.ndarray:
    """Cosines stretched over intervals `(..., 2)`, in `STEPS` of a side: float32 `(..., size, 64)`."""
    found = [
        _cosines(Interval(start / STEPS, stop / STEPS))[:size] for start, stop in intervals.reshape(-1, 2).tolist()
    ]
    return np.stack(found).reshape(*intervals.shape[:-1], size, SIDE)


@functools.lru_cache(8192)
def _cosines(interval: Interval) -> np.ndarray:
    """Cosines stretched over an interval, at the pixels: float32 `(32, 64)`; few intervals are ever asked for."""
    edges = np.arange(SIDE + 1) / SIDE
    start, stop = interval
    covered = np.clip((np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start)) * SIDE, 0, 1)
    angles = np.pi * (edges[:-1] + 0.5 / SIDE - start) / (stop - start)
    return (np.cos(np.arange(FINEST)[:, None] * angles) * covered / (SIDE * (stop - start))).astype(np.float32)


def in_steps(window: Window) -> np.ndarray:
    """The edges of a window in `STEPS` of a side, int `(2, 2)`: what is fitted moves by these."""
    return np.round(np.array(window) * STEPS).astype(int)


def as_window(edges: np.ndarray) -> Window:
    """The window of edges in `STEPS`."""
    return Window(*(Interval(start / STEPS, stop / STEPS) for start, stop in edges.tolist()))


def coarse(transforms: np.ndarray) -> np.ndarray:
    """Unit vectors float32 `(..., 64)` of transforms `(..., 8, 8)`; the first number, of the mean grey, is 0."""
    weighted = (transforms * _weights(COARSE)).reshape(*transforms.shape[:-2], -1)
    weighted[..., 0] = 0
    return weighted / np.maximum(np.linalg.norm(weighted, axis=-1, keepdims=True), 1e-9)


def fine(transforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors float32 `(..., 250)` of transforms `(..., 16, 16)`, and their lengths before: how much detail.

    Of fewer frequencies they are shorter.
    """
    size = transforms.shape[-1]
    is_chosen = _order(size) >= _LOWEST_FINE
    chosen = transforms[..., is_chosen] * _weights(size)[is_chosen]
    lengths = np.linalg.norm(chosen, axis=-1)
    return chosen / np.maximum(lengths, 1e-9)[..., None], lengths


@functools.cache
def _order(size: int) -> np.ndarray:
    return np.add.outer(np.arange(size), np.arange(size))


@functools.cache
def _weights(size: int) -> np.ndarray:
    squares = np.arange(size) ** 2
    return np.sqrt(1 + np.add.outer(squares, squares)).astype(np.float32)


def best_fit(thumbnail: np.ndarray, window: Window, wanted: np.ndarray) -> tuple[float, Window]:
    """Largest cosine of a vector of [`fine`] with those of a thumbnail's crops near a window, and that crop."""
    edges, cosine = in_steps(window), 0.0
    for move in _MOVES:
        for axis in (0, 1, 0, 1):
            near = edges[axis] + move * NUDGES
            moved, other = cosines(near, FINE), cosines(edges[1 - axis], FINE)
            found = other @ (thumbnail @ moved.mT) if axis == 0 else moved @ (thumbnail @ other.T)
            alike = fine(found)[0] @ wanted
            cosine, edges[axis] = float(alike.max()), near[alike.argmax()]
        if cosine < MIN_FITTED:
            break
    return cosine, as_window(edges)
