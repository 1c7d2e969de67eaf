"""Clips written on the spot by PyAV and Pillow."""

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image

# By container: a codec of PyAV's own FFmpeg.
CODECS = {"mp4": "libx264", "mov": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}


def moving_frames(count: int, width: int = 64, height: int = 48, seed: int = 0) -> np.ndarray:
    """uint8 `(count, height, width, 3)`: a coloured background, and a bright square on another place in each frame."""
    random = np.random.default_rng(seed)
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = random.integers(0, 100, (1, 1, 1, 3))
    # Grey levels that no codec confuses: the frame's number can be read from its left half.
    frames[:, :, : width // 2] = (np.arange(count) * 200 // max(1, count - 1) + 30).astype(np.uint8)[
        :, None, None, None
    ]
    for number in range(count):
        x = width // 2 + number * 3 % max(1, width // 2 - 8)
        frames[number, 8:16, x : x + 8] = 255
    return frames


def clip(frames: np.ndarray, rate: float = 10, container: str = "mp4", times: list[float] | None = None) -> bytes:
    """A clip of these frames at a constant rate, or each at its own time in seconds."""
    file = io.BytesIO()
    exact = Fraction(rate).limit_denominator(1001)
    with av.open(file, "w", format="matroska" if container == "mkv" else container) as output:
        stream = output.add_stream(CODECS[container], rate=exact)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        if container in ("mp4", "mov", "mkv"):
            stream.options = {"crf": "10", "g": "12"}
        base = 1 / exact if times is None else Fraction(1, 1000)
        stream.codec_context.time_base = base
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base = base
            frame.pts = number if times is None else round(times[number] * 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def animation(frames: np.ndarray, durations: list[int], format: str = "GIF") -> bytes:
    """A GIF, WEBP or PNG of these frames, each shown for so many milliseconds."""
    file, (first, *others) = io.BytesIO(), map(Image.fromarray, frames)
    options = {"lossless": True} if format == "WEBP" else {}
    first.save(file, format, save_all=True, append_images=others, duration=durations, loop=0, **options)
    return file.getvalue()


def rotated(mp4: bytes) -> bytes:
    """The same file, whose header says that it is to be shown turned by 90 degrees clockwise."""
    at = mp4.index(b"tkhd") + 4 + 40  # version 0: flags, times, id, duration, layer, volume
    matrix = b"".join(
        value.to_bytes(4, "big", signed=True) for value in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    )
    return mp4[:at] + matrix + mp4[at + 36 :]
