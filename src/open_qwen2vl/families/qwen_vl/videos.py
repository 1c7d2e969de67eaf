"""From a clip to the patches that the vision tower takes, uint8, and to a file of its sampled frames.

clip ── header (processing/videos.py) ─► Media ── VideoSizes ─► numbers of frames, their size
  │ decoded one after the other, resized, two frames a patch
  ▼
(pairs * rows * columns, 3 * 2 * P * P)        KEY.frames: a tar of meta.json and the resized frames, which stands
                                               for the clip wherever it would be read
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...processing.images import decode_pixels
from ...processing.sample_error import SampleError
from ...processing.videos import read_video_header, video_frames
from ..interface import Media
from .images import patchify, resized_pixels
from .sizes import VideoSizes

META_NAME = "meta.json"
JPEG_QUALITY = 95
_META_FIELDS = {
    "width": int,
    "height": int,
    "frames": int,
    "fps": float,
    "is_broken": bool,
    "size": list,
    "numbers": list,
}
_MOST_META = 1 << 16


def describe_video(read: Callable[[int | None], bytes], sizes: VideoSizes) -> tuple[Media, bool]:
    """A clip, or the file of its frames, by its header; and whether it breaks off.

    `read` gives so many bytes of it, or all: the frames of a clip are counted.

    SampleError: as [`read_video_header`], or `other_frames` for a file that was extracted with other options.
    """
    data = read(512 + _MOST_META)
    if not is_frames_file(data):
        header = read_video_header(read(None))
        return Media("video", *header[:4]), header.is_broken
    meta = read_meta(data)
    media = Media("video", meta["width"], meta["height"], meta["frames"], meta["fps"])
    check_frames(meta, media, sizes)
    return media, meta["is_broken"]


def video_patches(data: bytes, media: Media, sizes: VideoSizes, mode: str, skip_broken: bool = False) -> torch.Tensor:
    """The sampled frames of a clip as uint8 patches `(pairs * rows * columns, 3 * 2 * P * P)`."""
    pairs, rows, columns = sizes.grid(*media[1:])
    frames = resized_frames(data, media, sizes, mode, skip_broken)
    patches = np.empty((pairs, rows * columns, 6 * sizes.patch_size**2), np.uint8)
    for pair in patches:
        first = next(frames)
        # (3, 2, height, width) -> (6, height, width): a patch has both frames of each channel
        both = np.stack([first, next(frames, first)], axis=1).reshape(6, *first.shape[1:])
        pair[:] = patchify(both, sizes.patch_size, sizes.merge_size)
    return torch.from_numpy(patches.reshape(pairs * rows * columns, -1))


def resized_frames(
    data: bytes, media: Media, sizes: VideoSizes, mode: str, skip_broken: bool = False
) -> Iterator[np.ndarray]:
    """The frames that are shown of a clip, or of the file of its frames, uint8 `(3, height, width)`."""
    numbers = sizes.numbers(media.frames, media.fps)
    size = sizes.resized(media.width, media.height, len(numbers))
    if is_frames_file(data):
        yield from _extracted_frames(data, media, sizes)
        return
    planned = (media.width, media.height)
    for number, frame in enumerate(video_frames(data, numbers, media.frames, media.fps, skip_broken)):
        # Its placeholders are in the sequence by now. Later frames may have another size, and get this one.
        if number == 0 and frame.shape[1::-1] != planned:
            raise SampleError("video_changed", f"it has {frame.shape[1]}x{frame.shape[0]} pixels, planned "
                                               f"{planned[0]}x{planned[1]}")  # fmt: skip
        yield resized_pixels(frame, size, mode)


def is_frames_file(data: bytes) -> bool:
    """Whether this is what [`frames_file`] writes."""
    return data[:100].rstrip(b"\0") == META_NAME.encode() and data[257:262] == b"ustar"


def frames_file(
    data: bytes,
    media: Media,
    is_broken: bool,
    sizes: VideoSizes,
    mode: str,
    lossless: bool = False,
    skip_broken: bool = False,
) -> bytes:
    """A tar of a clip's `meta.json` and resized frames `000000.jpg` (or `.png`): read in its place, it gives the same
    ids and, with `lossless`, the same pixels.
    """
    numbers = sizes.numbers(media.frames, media.fps)
    size = sizes.resized(media.width, media.height, len(numbers))
    meta = {"width": media.width, "height": media.height, "frames": media.frames, "fps": media.fps,
            "is_broken": is_broken, "size": list(size), "numbers": numbers.tolist()}  # fmt: skip
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        _add(tar, META_NAME, json.dumps(meta).encode())
        for number, pixels in enumerate(resized_frames(data, media, sizes, mode, skip_broken)):
            frame, name = io.BytesIO(), f"{number:06d}.{'png' if lossless else 'jpg'}"
            options = {"format": "PNG"} if lossless else {"format": "JPEG", "quality": JPEG_QUALITY, "subsampling": 0}
            Image.fromarray(pixels.transpose(1, 2, 0)).save(frame, **options)
            _add(tar, name, frame.getvalue())
    return file.getvalue()


def read_meta(data: bytes) -> dict[str, Any]:
    """What stands in a frames file's `meta.json`; SampleError `corrupt_frames`."""
    try:
        size = int(data[124:135], 8)
        meta = json.loads(data[512 : 512 + size]) if size <= _MOST_META else None
        if all(type(meta[name]) is kind for name, kind in _META_FIELDS.items()):
            if min(meta["width"], meta["height"], meta["frames"]) > 0 and 0 < meta["fps"] < float("inf"):
                return meta
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise SampleError("corrupt_frames", f"its {META_NAME} is none of extract-frames")


def check_frames(meta: dict[str, Any], media: Media, sizes: VideoSizes) -> None:
    """Raise `other_frames` where a plan's options ask for other frames than a file has."""
    numbers = sizes.numbers(media.frames, media.fps).tolist()
    size = list(sizes.resized(media.width, media.height, len(numbers)))
    if (meta["numbers"], meta["size"]) != (numbers, size):
        raise SampleError(
            "other_frames",
            f"{len(meta['numbers'])} frames of {meta['size']} pixels were extracted, {len(numbers)} of {size} are "
            "wanted: extract and plan with the same options",
        )


def _extracted_frames(data: bytes, media: Media, sizes: VideoSizes) -> Iterator[np.ndarray]:
    meta = read_meta(data)
    if media[1:] != (meta["width"], meta["height"], meta["frames"], meta["fps"]):
        raise SampleError("video_changed", "its frames are of another clip than planned")
    check_frames(meta, media, sizes)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = tar.getmembers()[1:]
            files = [tar.extractfile(member).read() for member in members]
    except (tarfile.TarError, AttributeError, OSError) as error:
        raise SampleError("corrupt_frames", f"its frames cannot be read: {error}") from error
    names = [member.name for member in members]
    if len(files) != len(meta["numbers"]) or any(before >= after for before, after in pairwise(names)):
        raise SampleError("corrupt_frames", f"{len(files)} frames, {len(meta['numbers'])} in its {META_NAME}")
    for file in files:
        pixels = decode_pixels(file)
        height, width = pixels.shape[:2]
        if [height, width] != meta["size"]:
            raise SampleError("corrupt_frames", f"a frame of {width}x{height} pixels")
        yield np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
