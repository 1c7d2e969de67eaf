"""From a video file to upright RGB frames; every video of the project is opened here, as images are in images.py.

    bytes ── mp4, mov, webm, mkv, avi ── PyAV (extra `video`) ┐  header: packets are counted, one frame is decoded
          └─ gif, webp and other images ── Pillow             ┴► frames in their order, of which the chosen are kept

A frame's number is a time: number `k` of a clip of `frames` frames at `fps` a second is what is on screen after
`k / fps` seconds. At a constant frame rate these are the stored frames; elsewhere they follow the time stamps.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .images import MAX_PIXELS, opened_image, to_rgb
from .sample_error import SampleError

logger = logging.getLogger(__name__)

# By name, for FFmpeg's own guess may be a playlist, which opens other files and addresses.
_CONTAINERS = {"mov": (4, (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
               "matroska": (0, (b"\x1a\x45\xdf\xa3",)), "avi": (8, (b"AVI ",))}  # fmt: skip
# Seconds by which a time stamp may come late: matroska rounds to milliseconds.
_ROUNDING = 0.002
_STILL = 0.1  # seconds that a frame of an animation without a duration is shown, as in browsers


class VideoHeader(NamedTuple):
    """What planning knows of a clip."""

    width: int  # upright
    height: int
    frames: int
    fps: float  # frames a second, on the average
    is_broken: bool  # whether the file says that it has more frames than are there


Frames = Iterator[tuple[float, Callable[[], np.ndarray]]]  # start in seconds and what gives the pixels


def read_video_header(data: bytes) -> VideoHeader:
    """Upright size, number of frames and frame rate, counted and not believed.

    SampleError: `corrupt_video`, `no_video_stream`, `video_too_large`, or of an image file what [`decode_image`] has.
    """
    name = _container(data)
    if name is None:
        return _animation_header(data)
    first, starts, last, is_broken = None, [], 0.0, False
    with _opened(data, name) as (container, stream):
        claimed = stream.frames
        for packet in _packets(container, stream):
            if packet is None:
                is_broken = True
            elif packet.size:
                claimed -= 1
                if first is None:
                    first = next(_decoded(packet), None)
                stamp = packet.dts if packet.pts is None else packet.pts
                if not packet.is_discard and stamp is not None:
                    starts.append(float(stamp * packet.time_base))
                    last = float((packet.duration or 0) * packet.time_base)
        if first is None and starts:  # decoders that look ahead give it when nothing follows
            first = next(iter(stream.decode(None)), None)
        rate = float(stream.average_rate or 0)
        # Matroska says its length only; beside sound it may be that of the sound.
        length = (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0
    if first is None or not starts:
        raise SampleError("corrupt_video", "not a single frame of it can be decoded")
    turned = round(first.rotation / 90) % 2
    width, height = (first.height, first.width) if turned else (first.width, first.height)
    fps = _frame_rate(starts, last, rate)
    is_broken |= claimed > 0 or max(starts) - min(starts) + 2 / fps < length
    return VideoHeader(width, height, len(starts), fps, is_broken)


def video_frames(
    data: bytes, numbers: Sequence[int], frames: int, fps: float, skip_broken: bool = False
) -> Iterator[np.ndarray]:
    """The frames of these ascending numbers, uint8 `(height, width, 3)`, decoded one after the other.

    `frames` and `fps` are the header's. Where a clip breaks off, the last frame stands for those behind it, which is
    logged. SampleError: `corrupt_video`, or `broken_video` with `skip_broken`.
    """
    name, at, count, longest = _container(data), 0, 0, 0.0
    start, pixels = 0.0, None
    for following, read in _animation_frames(data) if name is None else _decoded_frames(data, name):
        while pixels is not None and at < len(numbers) and numbers[at] / fps + _ROUNDING < following:
            yield pixels()
            at += 1
        if at == len(numbers):
            return
        count, longest = count + 1, max(longest, following - start)
        start, pixels = following, read
    if pixels is None:
        raise SampleError("corrupt_video", "not a single frame of it can be decoded")
    missing = [number for number in numbers[at:] if number / fps > start + max(longest, 1 / fps) + _ROUNDING]
    if missing and count < frames:
        if skip_broken:
            raise SampleError("broken_video", f"it breaks off after {count} of {frames} frames")
        logger.warning("a video breaks off after %d of %d frames: its last is shown in their place", count, frames)
    if at < len(numbers):
        last = pixels()
        yield from (last for _ in numbers[at:])


def _frame_rate(starts: list[float], last: float, rate: float) -> float:
    """Frames a second: the container's own where it agrees with the time stamps."""
    length = max(starts) - min(starts)
    mean = length / (len(starts) - 1) if len(starts) > 1 else 0.0
    if rate and (len(starts) == 1 or abs((len(starts) - 1) / rate - length) < _ROUNDING):
        return rate
    length += last or mean
    return len(starts) / length if length else rate or 1 / _STILL


def _container(data: bytes) -> str | None:
    return next((name for name, (at, marks) in _CONTAINERS.items()
                 if any(data[at : at + len(mark)] == mark for mark in marks)), None)  # fmt: skip


@contextlib.contextmanager
def _opened(data: bytes, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream."""
    try:
        import av
    except ImportError as error:
        raise ValueError('videos are read by PyAV: pip install "open-qwen2vl[video]"') from error
    try:
        with av.open(io.BytesIO(data), format=name) as container:
            # A picture on the cover is a stream as well.
            cover = av.stream.Disposition.attached_pic
            streams = [one for one in container.streams.video if not one.disposition & cover]
            if not streams:
                raise SampleError("no_video_stream", "there is no video stream in it")
            stream = streams[0]
            if stream.codec_context is None:
                raise SampleError("corrupt_video", "its codec is not known")
            if stream.width * stream.height > MAX_PIXELS:
                raise SampleError("video_too_large", f"{stream.width}x{stream.height} pixels are above {MAX_PIXELS}")
            # One thread: the loader's workers are processes.
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError("corrupt_video", f"{type(error).__name__}: {error}") from error


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """The packets of a stream, the last one empty; None behind the last that can be read, where the file is broken."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            yield None
            return
        if packet is None:
            return
        if packet.is_corrupt:
            yield None
        else:
            yield packet


def _decoded(packet: Any) -> Iterator[Any]:
    """The whole frames of a packet; a damaged one has none."""
    import av

    try:
        # Of half a picture the decoder makes up the other half.
        yield from (frame for frame in packet.decode() if not frame.is_corrupt)
    except av.error.FFmpegError:
        return


def _decoded_frames(data: bytes, name: str) -> Frames:
    first, count = None, 0
    with _opened(data, name) as (container, stream):
        rate = float(stream.average_rate or 25)
        for packet in _packets(container, stream):
            for frame in _decoded(packet) if packet is not None else ():
                stamp = count / rate if frame.time is None else frame.time
                first = stamp if first is None else first
                yield stamp - first, lambda frame=frame: _upright(frame)
                count += 1


def _upright(frame: Any) -> np.ndarray:
    turns = round(frame.rotation / 90) % 4
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _animation_header(data: bytes) -> VideoHeader:
    ends, width, height, is_broken = 0.0, 0, 0, False
    with _animation(data) as image:
        for count in range(1, image.n_frames + 1 if hasattr(image, "n_frames") else 2):
            try:
                ends += _shown(image, count - 1)
            except (OSError, EOFError):
                if count == 1:
                    raise
                is_broken, count = True, count - 1
                break
            if count == 1:
                width, height = to_rgb(image).size
    return VideoHeader(width, height, count, count / ends, is_broken)


def _animation_frames(data: bytes) -> Frames:
    start = 0.0
    with _animation(data) as image:
        for number in range(getattr(image, "n_frames", 1)):
            try:
                shown = _shown(image, number)
            except (OSError, EOFError):
                if number == 0:
                    raise
                return
            picture = image.copy()
            yield start, lambda picture=picture: np.array(to_rgb(picture))
            start += shown


@contextlib.contextmanager
def _animation(data: bytes) -> Iterator[Any]:
    try:
        with opened_image(data) as image:
            yield image
    except SampleError as error:
        raise SampleError(error.reason.replace("image", "video"), f"{error}; nor is it a video") from error


def _shown(image: Any, number: int) -> float:
    """Seconds that a frame is shown, which is decoded."""
    image.seek(number)
    image.load()
    return (image.info.get("duration") or 0) / 1000 or _STILL
