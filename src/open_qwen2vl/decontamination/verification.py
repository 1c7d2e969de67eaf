"""Do two pictures that lie on each other show the same?

    transforms (32, 32) of both ── 64x64 pixels ── 64 blocks of 8x8
        unlike: other detail (what is neither constant nor falls evenly), another grey or another color
        evidence: alike, and with a corner, for edges and outlines are alike in many pictures

The more evidence there is, the more blocks may be unlike: something may be written or pasted there.
"""

import functools
from typing import NamedTuple

import numpy as np

from .pictures import (
    COARSE,
    COLOR_SIDE,
    FINEST,
    NUDGES,
    SIDE,
    WHOLE,
    Thumbnail,
    Window,
    as_window,
    cosines,
    in_steps,
    transform,
)

LIMIT = 0.85  # similarity from which it is a copy
MIN_CORNERS = 8  # blocks with a corner; of fewer a picture cannot be told from others
_MIN_EVIDENCE = 4
_ALLOWED, _BY_EVIDENCE = (0.1, 0.25), (8, 24)  # share of blocks that may be unlike, with so much evidence
_MIN_DETAIL, _DETAIL_SHARE = 20.0, 0.1  # length of a block's detail, above what JPEG adds; of the mean of all
_MIN_GRADIENT, _MIN_CORNER = 2.0, 0.2  # across a block's main direction, in grey levels a pixel; of that along it
_MIN_CORRELATION, _GREY_RANGE, _COLOR_RANGE = 0.7, 30.0, 25.0  # of blocks that are alike; levels
_GREY = 4.0  # levels of color below which a picture is grey, and may be the grey copy of another
_MOVES = (2, 1)  # of a crop's edges, in steps


class Shown(NamedTuple):
    """What a picture or a crop shows."""

    grey: np.ndarray  # transform, float32 (32, 32)
    color: np.ndarray  # transforms, float32 (2, 8, 8)

    def mirrored(self) -> "Shown":
        """The same in a mirror."""
        signs = (-1.0) ** np.arange(FINEST, dtype=np.float32)  # of horizontal frequencies
        return Shown(self.grey * signs, self.color * signs[:COARSE])


def shown(thumbnail: Thumbnail, window: Window = WHOLE) -> Shown:
    """What a crop of a thumbnail shows."""
    wide = SIDE // COLOR_SIDE
    color = (thumbnail.color.astype(np.float32) - 128).repeat(wide, axis=1).repeat(wide, axis=2)
    grey = transform(thumbnail.grey.astype(np.float32), window, FINEST)
    return Shown(grey, transform(color, window, COARSE))


def corners(picture: Shown) -> int:
    """In how many of its 64 blocks a picture has a corner."""
    across, along = _gradients(picture.grey)
    is_detailed = np.linalg.norm(_details(picture.grey), axis=1) >= _MIN_DETAIL
    return int((is_detailed & _is_corner(across, along)).sum())


def similarity(picture: Shown, thumbnail: Thumbnail, window: Window) -> float:
    """How much a picture is like the crop of a thumbnail that lies at a window or very near, 0 to 1."""
    other = shown(thumbnail, _refined(thumbnail.grey.astype(np.float32), window, picture.grey))
    one, two = _details(picture.grey), _details(other.grey)
    lengths = np.linalg.norm([one, two], axis=-1)
    # As a correlation, but 1 only where the contrasts are equal too.
    correlations = 2 * (one * two).sum(axis=1) / np.maximum((lengths**2).sum(axis=0), 1e-9)
    longest = lengths.max(axis=0)
    is_detailed = longest >= np.maximum(_MIN_DETAIL, _DETAIL_SHARE * longest.mean())
    is_unlike = _differs(picture, other) | (is_detailed & (correlations < _MIN_CORRELATION))
    (across, along), (other_across, other_along) = _gradients(picture.grey), _gradients(other.grey)
    is_corner = _is_corner(np.minimum(across, other_across), np.maximum(along, other_along))
    evidence = int((is_detailed & ~is_unlike & is_corner).sum())
    if evidence < _MIN_EVIDENCE:
        return 0.0
    share = is_unlike.sum() / (is_unlike | is_detailed).sum()
    return float(max(0.0, 1 - (1 - LIMIT) * share / np.interp(evidence, _BY_EVIDENCE, _ALLOWED)))


def _refined(grey: np.ndarray, window: Window, wanted: np.ndarray) -> Window:
    """The crop of grey pixels `(64, 64)` near a window whose transform is most like that of a picture."""
    weights = np.sqrt(_rise()) * _fall()
    weights[0, 0] = 0
    aim, edges = (wanted * weights).ravel(), in_steps(window)
    for move in _MOVES:
        for axis in (0, 1):
            near = edges[axis] + move * NUDGES
            moved, other = cosines(near, FINEST), cosines(edges[1 - axis], FINEST)
            found = other @ (grey @ moved.mT) if axis == 0 else moved @ (grey @ other.T)
            vectors = (found * weights).reshape(len(near), -1)
            alike = vectors @ aim / np.maximum(np.linalg.norm(vectors, axis=1), 1e-9)
            edges[axis] = near[alike.argmax()]
    return as_window(edges)


def _differs(one: Shown, other: Shown) -> np.ndarray:
    """Which blocks are of another grey or color, bool `(64,)`; the color of a grey picture does not count."""
    grey = _in_blocks(_pixels((one.grey - other.grey) * _fall()))
    colors = [_pixels(each.color) for each in (one, other)]
    difference = np.sqrt(((colors[0] - colors[1]) ** 2).sum(axis=0)).ravel()
    strengths = [np.sqrt((color**2).sum(axis=0).mean()) for color in colors]
    is_other_color = (difference > _COLOR_RANGE) & (min(strengths) >= _GREY)
    return (np.abs(grey).mean(axis=1) > _GREY_RANGE) | is_other_color


def _details(transform: np.ndarray) -> np.ndarray:
    """What the blocks of a transform `(32, 32)` show beside their means and slopes: float32 `(64, 64)`."""
    blocks, planes = _in_blocks(_pixels(transform * np.sqrt(_rise()) * _fall())), _planes()
    return blocks - blocks @ planes @ planes.T


def _gradients(transform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of each block across its main direction and along it, `(64,)`: of an edge the first is small."""
    down, right = np.gradient(_pixels(transform * _fall()))
    xx, yy, xy = (_in_blocks(product).mean(axis=1) for product in (right**2, down**2, right * down))
    spread = np.sqrt((xx - yy) ** 2 + 4 * xy**2)
    return np.sqrt(np.maximum(xx + yy - spread, 0) / 2), np.sqrt((xx + yy + spread) / 2)


def _is_corner(across: np.ndarray, along: np.ndarray) -> np.ndarray:
    return (across >= _MIN_GRADIENT) & (across >= _MIN_CORNER * along)


def _in_blocks(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(8, 8, 8, 8).swapaxes(1, 2).reshape(64, 64)


def _pixels(transforms: np.ndarray) -> np.ndarray:
    """Pixels `(..., 2n, 2n)` of transforms `(..., n, n)` of 32 frequencies, `(..., n, n)` of 8."""
    waves = _waves(transforms.shape[-1])
    return waves @ transforms @ waves.T


@functools.cache
def _waves(count: int) -> np.ndarray:
    side = SIDE if count == FINEST else count  # a pixel of color is a block
    along = (np.arange(side) + 0.5) / side
    waves = 2 * np.cos(np.pi * np.arange(count) * along[:, None])
    waves[:, 0] = 1
    return waves.astype(np.float32)


@functools.cache
def _rise() -> np.ndarray:
    """What undoes the fall of a photograph's frequencies, `(32, 32)`."""
    squares = np.arange(FINEST) ** 2
    return np.sqrt(1 + np.add.outer(squares, squares)).astype(np.float32)


@functools.cache
def _fall() -> np.ndarray:
    """Weights that fall to the highest frequencies: cut off, they would ring in blocks that show nothing."""
    fall = np.cos(np.pi / 2 * np.arange(FINEST) / FINEST) ** 2
    return np.outer(fall, fall).astype(np.float32)


@functools.cache
def _planes() -> np.ndarray:
    """What is constant or falls evenly over a block, as orthonormal columns `(64, 3)`."""
    along = np.arange(8, dtype=np.float32) - 3.5
    columns = np.stack([np.ones((8, 8)), *np.meshgrid(along, along)]).reshape(3, 64)
    return (columns / np.linalg.norm(columns, axis=-1, keepdims=True)).T.astype(np.float32)
