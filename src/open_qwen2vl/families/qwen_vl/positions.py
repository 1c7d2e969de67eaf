"""M-RoPE without a model: four rows of positions for one document, equal to transformers' `get_rope_index`.

Row 0 counts the document's tokens and says where a document begins; rows 1 to 3 (time, height, width) turn queries
and keys. A token of text has the same number in all three; the tokens of an image share a time and count their rows
and columns; what follows goes on behind the largest of rows and columns.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

AfterVideo = Literal["space", "time"]


class VideoRule(NamedTuple):
    """How a checkpoint numbers videos; images do not depend on it."""

    # what text behind a video counts on from: the largest of its rows and columns (`"space"`, transformers 5), or of
    # its frames too (`"time"`, the paper and older code)
    after: AfterVideo = "space"
    tokens_per_second: float | None = None  # Qwen2.5-VL's times are seconds times this; None counts frames
    frames_apart: bool = False  # Qwen3-VL's frames are images of their own, between time stamps


def mrope_positions(
    input_ids: np.ndarray,
    image_token_id: int,
    image_grids: np.ndarray,
    merge_size: int,
    video_token_id: int = -1,
    video_grids: np.ndarray | None = None,
    seconds_per_grid: list[float] | None = None,
    video_rule: VideoRule | None = None,
) -> np.ndarray:
    """Positions of one document, int64 `(4, S)`; grids are `(media, 3)` in patches, in reading order."""
    rule = video_rule or VideoRule()
    grids = {
        image_token_id: iter([(1, *grid[1:], 1) for grid in np.asarray(image_grids).tolist()]),
        video_token_id: _video_grids(video_grids, seconds_per_grid, rule),
    }
    rows, start, position = [], 0, 0
    placeholders = np.flatnonzero(np.isin(input_ids, list(grids)))
    # From image to image, not from token to token: a document has few images and many tokens.
    while (next_media := np.searchsorted(placeholders, start)) < len(placeholders):
        first = int(placeholders[next_media])
        frames, height, width, step = _next_grid(grids[int(input_ids[first])], first)
        height, width = height // merge_size, width // merge_size
        rows += [_text(position, first - start), _block(position + first - start, frames, height, width, step)]
        last_time = int(rows[-1][0, -1]) - position - (first - start) if rule.after == "time" else 0
        # Text counts on behind the largest coordinate: positions grow more slowly than the sequence.
        position += first - start + max(height, width, last_time + 1)
        start = first + frames * height * width
        # A grid of another image would shift all that follows in silence.
        if (input_ids[first:start] != input_ids[first]).any():
            raise ValueError(f"the grid of the placeholders at {first} is not theirs")
    if any(next(iterator, None) is not None for iterator in grids.values()):
        raise ValueError("there are more image or video grids than placeholders for them")
    rows.append(_text(position, len(input_ids) - start))
    rotary = np.concatenate(rows, axis=1)
    if rotary.shape[1] != len(input_ids):
        raise ValueError("image or video grids and placeholders differ in number")
    return np.concatenate([np.arange(len(input_ids))[None], rotary])


def _text(position: int, length: int) -> np.ndarray:
    if length < 0:
        raise ValueError("image or video grids and placeholders differ in number")
    return np.broadcast_to(np.arange(position, position + length), (3, length))


def _block(position: int, frames: int, height: int, width: int, step: float) -> np.ndarray:
    # In fp32 as there: a product just below a whole number must not be cut another way.
    times = (np.arange(frames, dtype=np.float32) * np.float32(step)).astype(np.int64)
    axes = np.meshgrid(times, np.arange(height), np.arange(width), indexing="ij")
    return np.stack(axes).reshape(3, -1) + position


def _video_grids(
    grids: np.ndarray | None, seconds_per_grid: list[float] | None, rule: VideoRule
) -> Iterator[tuple[int, int, int, float]]:
    for number, (frames, height, width) in enumerate([] if grids is None else np.asarray(grids).tolist()):
        if rule.frames_apart:
            yield from [(1, height, width, 1)] * frames
        elif rule.tokens_per_second is None:
            yield frames, height, width, 1
        else:
            seconds = 1.0 if seconds_per_grid is None else seconds_per_grid[number]
            yield frames, height, width, rule.tokens_per_second * seconds


def _next_grid(grids: Iterator[tuple[int, int, int, float]], index: int) -> tuple[int, int, int, float]:
    try:
        return next(grids)
    except StopIteration:
        raise ValueError(f"the placeholder at {index} has no image or video grid") from None
