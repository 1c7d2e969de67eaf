"""Dynamic resolution: what size an image or a video gets and how many patches and tokens, from its header alone.

An image: rows and columns of patches. A video: its sampled frames in pairs, each pair a grid of the same size.
"""

from dataclasses import dataclass

import numpy as np
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_video

from ...processing.sample_error import SampleError

WINDOW_SIZE = 112  # pixels of a window's side in the released Qwen2.5-VL


def squared_in_windows(sides: tuple[float, float], window: int) -> float:
    """Sum over the windows of a frame of their patches squared; sides in patches, the last windows are smaller."""
    rows, columns = (side // window * window**2 + (side % window) ** 2 for side in sides)
    return rows * columns


@dataclass(frozen=True)
class ImageSizes:
    """The sizes that a checkpoint's image processor, or a source's own budget, allows."""

    patch_size: int  # pixels of a patch's side
    merge_size: int  # patches of a token's side
    min_pixels: int  # smaller images are enlarged to it
    max_pixels: int  # larger images are reduced to it
    fixed_resolution: int | None = None  # side of the square that every image becomes instead, for ablations

    def __post_init__(self):
        area = self.factor**2
        if not 0 < self.min_pixels <= self.max_pixels or self.max_pixels < area:
            raise ValueError(
                f"min_pixels ({self.min_pixels}) and max_pixels ({self.max_pixels}): must be above 0, in this order, "
                f"and hold a token of {area} pixels"
            )
        if self.fixed_resolution is not None and (self.fixed_resolution <= 0 or self.fixed_resolution % self.factor):
            raise ValueError(f"fixed_resolution: {self.fixed_resolution} is no multiple of {self.factor} pixels")

    @property
    def factor(self) -> int:
        """Pixels of a token's side."""
        return self.patch_size * self.merge_size

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Height and width in pixels of an upright image after resizing; an aspect above 200 is a SampleError."""
        if self.fixed_resolution is not None:
            return self.fixed_resolution, self.fixed_resolution
        try:
            return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        except ValueError as error:
            raise SampleError("image_aspect", f"{width}x{height} pixels: {error}") from error

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches."""
        resized_height, resized_width = self.resized(width, height)
        return resized_height // self.patch_size, resized_width // self.patch_size

    def tokens(self, width: int, height: int) -> int:
        """Placeholders, without the two marks around them."""
        rows, columns = self.grid(width, height)
        return rows * columns // self.merge_size**2


@dataclass(frozen=True)
class VideoSizes:
    """Which frames of a clip are shown, and how large: what a video processor does, within a budget of tokens.

    Counts are those of transformers' video processors where those do not fail. Every frame gets the same size, lowered
    until the clip takes at most `max_tokens` positions (marks and time stamps not counted).
    """

    patch_size: int  # pixels of a patch's side
    merge_size: int  # patches of a token's side
    min_pixels: int  # of a frame, or of the whole clip with `whole_clip`; smaller ones are enlarged to it
    max_pixels: int  # likewise; larger ones are reduced to it
    fps: float  # frames that are shown of a second
    min_frames: int
    max_frames: int
    max_tokens: int
    whole_clip: bool = False  # Qwen3-VL's rules: bounds are of all frames together, the last frame is always shown
    pair: int = 2  # frames that share a patch

    def __post_init__(self):
        if self.fps <= 0:
            raise ValueError(f"video_fps must be above 0, got {self.fps}")
        if self.max_frames < self.pair or self.max_frames % self.pair:
            raise ValueError(f"max_frames must be even and at least {self.pair}, got {self.max_frames}")
        if self.max_tokens < self.max_frames // self.pair:
            raise ValueError(f"max_video_tokens {self.max_tokens}: below a token for each pair of max_frames "
                             f"({self.max_frames}) frames")  # fmt: skip
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"pixels of videos from {self.min_pixels} to {self.max_pixels}: not above 0 in this order"
            )

    @property
    def factor(self) -> int:
        """Pixels of a token's side."""
        return self.patch_size * self.merge_size

    def count(self, frames: int, fps: float) -> int:
        """Frames that are shown of a clip of so many; an odd number's last one is shown twice."""
        wanted = frames / fps * self.fps
        if self.whole_clip:
            return min(max(int(wanted), self.min_frames), self.max_frames, frames)
        most = min(self.max_frames, frames) // self.pair * self.pair
        return int(min(max(wanted, self.min_frames), most)) // self.pair * self.pair or 1

    def numbers(self, frames: int, fps: float) -> np.ndarray:
        """Numbers of the frames that are shown, int64 `(count,)`, ascending."""
        count = self.count(frames, fps)
        if self.whole_clip:
            return np.linspace(0, frames - 1, count).round().astype(np.int64)
        # In whole numbers: by a step in floats, as in transformers, 1 length of 80 has a frame too many.
        return np.arange(count) * frames // count

    def times(self, frames: int, fps: float) -> list[float]:
        """Seconds at which the pairs stand, the mean of their two frames."""
        seconds = [number / fps for number in self.numbers(frames, fps).tolist()]
        seconds += seconds[-1:] * (len(seconds) % self.pair)
        return [(first + last) / 2 for first, last in zip(seconds[::2], seconds[1::2], strict=True)]

    def resized(self, width: int, height: int, count: int) -> tuple[int, int]:
        """Height and width in pixels of each of so many frames; an aspect above 200 is a SampleError."""
        # Tokens of a pair, in pixels of one of its frames.
        area = self.max_tokens // -(-count // self.pair) * self.factor**2
        count = max(count, self.pair)
        # There an odd number is rounded, to even halves.
        most = area * min(count, round(count / self.pair) * self.pair) if self.whole_clip else area
        low, high = min(self.min_pixels, most), min(self.max_pixels, most)
        try:
            if self.whole_clip:
                sides = smart_resize_video(count, height, width, self.pair, self.factor, low, high)
            else:
                sides = smart_resize(height, width, self.factor, low, high)
        except ValueError as error:
            raise SampleError("video_aspect", f"{width}x{height} pixels: {error}") from error
        # What is far wider than high keeps a token's height, and would be above the budget.
        if (shorter := min(sides)) * max(sides) > area:
            longer = max(self.factor, area // shorter // self.factor * self.factor)
            return (shorter, longer) if sides[0] == shorter else (longer, shorter)
        return sides

    def grid(self, width: int, height: int, frames: int, fps: float) -> tuple[int, int, int]:
        """Pairs of frames, and rows and columns of patches in each."""
        count = self.count(frames, fps)
        resized_height, resized_width = self.resized(width, height, count)
        return -(-count // self.pair), resized_height // self.patch_size, resized_width // self.patch_size
