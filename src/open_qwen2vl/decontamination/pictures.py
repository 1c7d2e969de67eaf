"""Is one picture a copy of another: re-encoded, resized, cropped, mirrored, framed, grey or written on?

    image ── grey 256x256 ── views: whole, without its frame, both mirrored ── grey 64x64 ── cosine transform
    coarse (64,): frequencies below 8      finds candidates among the crops of the evaluation pictures
    fine (250,): frequencies below 16      moves the candidate's crop until it fits best
    16 blocks of both                      which are alike, or show something else

A crop is an interval of each axis: its transform is that of the whole thumbnail's pixels by cosines that are stretched
over the interval, so no crop is ever resized. Frequencies are weighted by what undoes their fall in photographs; the
lowest, which smooth skies and gradients share, count in the candidates alone.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE, COARSE, FINE = 64, 8, 16  # pixels of a thumbnail; frequencies of an axis
COARSE_SIZE = COARSE**2  # a number of which libraries compare 16 at a time
LENGTHS = (1.0, 0.925, 0.85, 0.775, 0.7)  # of indexed crops, in parts of a side
_STEP, _MOST_STRETCH = 0.075, 0.08  # between crops; by which a crop's sides may differ
_GREY = 256  # pixels in which frames are looked for
_PLAIN = 2.0  # grey levels (standard deviation) below which a picture shows nothing
_FRAME_RANGE, _SMALLEST_INSIDE = 12, 0.3  # grey levels within a line of a frame; part of a side that a picture keeps
_LOWEST_FINE = 3
MIN_BLOCKS, _MIN_BLOCK_DETAIL, _BLOCK_SHARE = 6, 8.0, 0.25  # of 16; lengths; of the mean length
_MOVES = (0.04, 0.02, 0.01)  # of a crop's edges, in parts of a side
_NUDGES = np.array(list(itertools.product((-1, 0, 1), repeat=2)))  # of both edges


class Interval(NamedTuple):
    """A part of an axis."""

    start: float
    stop: float


class Window(NamedTuple):
    """A crop of a picture."""

    x: Interval
    y: Interval


def _intervals(length: float) -> list[Interval]:
    starts = np.linspace(0, 1 - length, round((1 - length) / _STEP) + 1)
    return [Interval(float(start), float(start) + length) for start in starts]


WINDOWS = tuple(
    Window(x, y)
    for wide, high in itertools.product(LENGTHS, LENGTHS)
    if abs(wide - high) <= _MOST_STRETCH
    for x, y in itertools.product(_intervals(wide), _intervals(high))
)


def thumbnails(image: Image.Image) -> np.ndarray:
    """Grey thumbnails of the picture, and of what is inside its frame if it has one: float32 `(1 or 2, 64, 64)`.

    None, `(0, 64, 64)`, of a picture of one grey.
    """
    grey = image.convert("L").resize((_GREY, _GREY), Image.Resampling.BOX)
    boxes = [(0, 0, _GREY, _GREY), *_inside_of_frame(np.asarray(grey, np.int16))]
    found = [np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX, box), np.float32) for box in boxes]
    return np.stack(found) if found[0].std() >= _PLAIN else np.empty((0, SIDE, SIDE), np.float32)


def _inside_of_frame(grey: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of what plain lines at the edges leave, if they leave neither all nor too little."""
    rows, columns = (np.flatnonzero(np.ptp(grey, axis=axis) > _FRAME_RANGE) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return []
    # Half of the outermost pixels may be of the frame.
    first = [int(found[0]) + (found[0] > 0) for found in (columns, rows)]
    last = [int(found[-1]) + (found[-1] == _GREY - 1) for found in (columns, rows)]
    sides = [stop - start for start, stop in zip(first, last, strict=True)]
    if min(sides) < _SMALLEST_INSIDE * _GREY or max(_GREY - side for side in sides) <= 4:
        return []
    return [(*first, *last)]


def transform(thumbnail: np.ndarray, window: Window, size: int) -> np.ndarray:
    """Cosine transform of a crop of thumbnails `(..., 64, 64)`: `(..., size, size)`, vertical frequencies first."""
    return _fixed_cosines(window.y, size) @ thumbnail @ _fixed_cosines(window.x, size).T


@functools.lru_cache(1024)
def _fixed_cosines(interval: Interval, size: int) -> np.ndarray:
    return _cosines(np.array(interval), size)


def _cosines(intervals: np.ndarray, size: int) -> np.ndarray:
    """Cosines stretched over intervals `(..., 2)`, sampled at the pixels: float32 `(..., size, 64)`."""
    edges = np.arange(SIDE + 1) / SIDE
    start, stop = intervals[..., :1], intervals[..., 1:]
    covered = np.clip((np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start)) * SIDE, 0, 1)
    angles = (np.pi * (edges[:-1] + 0.5 / SIDE - start) / (stop - start)).astype(np.float32)
    weights = (covered / (SIDE * (stop - start))).astype(np.float32)
    return np.cos(np.arange(size, dtype=np.float32)[:, None] * angles[..., None, :]) * weights[..., None, :]


def coarse(transforms: np.ndarray) -> np.ndarray:
    """Unit vectors float32 `(..., 64)` of transforms `(..., 8, 8)`; the first number, of the mean grey, is 0."""
    weighted = (transforms * _weights(COARSE)).reshape(*transforms.shape[:-2], -1)
    weighted[..., 0] = 0
    return weighted / np.maximum(np.linalg.norm(weighted, axis=-1, keepdims=True), 1e-9)


def fine(transforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors float32 `(..., 250)` of transforms `(..., 16, 16)`, and their lengths before: how much detail."""
    chosen = transforms[..., _order(FINE) >= _LOWEST_FINE] * _weights(FINE)[_order(FINE) >= _LOWEST_FINE]
    lengths = np.linalg.norm(chosen, axis=-1)
    return chosen / np.maximum(lengths, 1e-9)[..., None], lengths


@functools.cache
def _order(size: int) -> np.ndarray:
    return np.add.outer(np.arange(size), np.arange(size))


@functools.cache
def _weights(size: int) -> np.ndarray:
    squares = np.arange(size) ** 2
    return np.sqrt(1 + np.add.outer(squares, squares)).astype(np.float32)


def best_fit(thumbnail: np.ndarray, window: Window, wanted: np.ndarray) -> tuple[float, np.ndarray]:
    """Largest cosine of a vector of [`fine`] with those of a thumbnail's crops near a window, and that transform."""
    edges = np.array(window)
    for move in _MOVES:
        for axis in (0, 1, 0, 1):
            near = edges[axis] + move * _NUDGES
            moved, other = _cosines(near, FINE), _cosines(edges[1 - axis], FINE)
            found = other @ (thumbnail @ moved.mT) if axis == 0 else moved @ (thumbnail @ other.T)
            cosines = fine(found)[0] @ wanted
            best = int(cosines.argmax())
            edges[axis] = near[best]
    return float(cosines[best]), found[best]


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """In how far two pictures are the same, of their transforms `(16, 16)`: -1 to 1.

    Each of 16 blocks that show anything is compared for itself. The lowest may be of what was written or pasted there
    and do not count: one of 6 blocks, half of 16. One edge or spot is alike in many pictures: below 6 blocks it is 0.
    """
    blocks = np.stack([_blocks(one), _blocks(other)])
    lengths = np.linalg.norm(blocks, axis=-1)
    chosen = _shown(lengths.max(axis=0))
    if chosen.sum() < MIN_BLOCKS:
        return 0.0
    # As a correlation, but 1 only where the contrasts are equal too.
    products = 2 * (blocks[0] * blocks[1]).sum(axis=-1)[chosen]
    alike = np.sort(products / (lengths**2).sum(axis=0)[chosen])
    return float(alike[2 * (len(alike) - 4) // 3])


def shown_blocks(transform: np.ndarray) -> int:
    """In how many of its 16 blocks a picture shows anything; of its transform `(16, 16)`."""
    return int(_shown(np.linalg.norm(_blocks(transform), axis=-1)).sum())


def _shown(lengths: np.ndarray) -> np.ndarray:
    return lengths >= np.maximum(_MIN_BLOCK_DETAIL, _BLOCK_SHARE * lengths.mean())


def _blocks(transform: np.ndarray) -> np.ndarray:
    """A picture of 32x32 pixels of a transform, in 16 blocks without their means and slopes: float32 `(16, 64)`."""
    waves, planes = _inverse(), _planes()
    picture = waves @ (transform * _soft_weights()) @ waves.T
    tiles = picture.reshape(4, 8, 4, 8).swapaxes(1, 2).reshape(16, 64)
    return tiles - tiles @ planes @ planes.T


@functools.cache
def _soft_weights() -> np.ndarray:
    """Weights that fall to the highest frequencies: cut off, they would ring in blocks that show nothing."""
    fall = np.cos(np.pi / 2 * np.arange(FINE) / FINE) ** 2
    return (np.sqrt(_weights(FINE)) * np.outer(fall, fall)).astype(np.float32)


@functools.cache
def _planes() -> np.ndarray:
    """What is constant or falls evenly over a block, as orthonormal columns `(64, 3)`."""
    along = np.arange(8, dtype=np.float32) - 3.5
    columns = np.stack([np.ones((8, 8)), *np.meshgrid(along, along)]).reshape(3, 64)
    return (columns / np.linalg.norm(columns, axis=-1, keepdims=True)).T.astype(np.float32)


@functools.cache
def _inverse() -> np.ndarray:
    along = (np.arange(2 * FINE) + 0.5) / (2 * FINE)
    return (2 * np.cos(np.pi * np.arange(FINE) * along[:, None])).astype(np.float32)
