"""From a tar to its pairs of image and caption: members are read and prepared by threads, ahead of who scores them."""

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ...places import OpenFile, open_file
from ...processing.images import decode_image
from ...processing.sample_error import SampleError
from ...transfers import local_copy
from ..documents.records import caption_members
from ..engine.engine import ShardTask
from ..storage.tars import IMAGE_EXTENSIONS, Sample, has_bad_uid, index_shard, read_json, read_member, sample_uid

MAX_ASPECT_RATIO = 200  # Qwen2-VL's own limit; others would resize such an image to a very large one
MAX_CAPTION = 8192  # characters: one endless caption would take the memory of its whole batch
_WITHOUT_CAPTION = ("missing_caption", "empty_caption", "bad_caption_encoding")


class RawPair(NamedTuple):
    """A sample as it stands in its tar."""

    key: str  # of the sample
    uid: str  # 32 lower-case hex digits
    image: bytes  # the image file
    caption: str  # unchanged; empty only where none is needed


class Pair(NamedTuple):
    """A sample with its image decoded."""

    key: str  # of the sample
    uid: str  # 32 lower-case hex digits
    image: Image.Image  # upright, mode RGB
    caption: str  # not empty, unchanged


class PreparedSample(NamedTuple):
    """What became of a sample."""

    key: str  # of the sample
    uid: str  # 32 lower-case hex digits; of a `bad_uid` those that it would have without one
    item: Any  # what `prepare` returned, `None` if there is a reason
    reason: str | None  # why it cannot be used


@contextlib.contextmanager
def read_tar(
    task: ShardTask, prepare: Callable[[Any], Any], num_threads: int = 0, ahead: int = 0
) -> Iterator[tuple[Iterator[PreparedSample], list[tuple[str, str]]]]:
    """All samples of a tar as of [`read_pairs`], and key and reason of what of it is no sample."""
    with local_copy(task.source) as tar:  # all of it is read
        index = index_shard(tar)
        yield read_pairs(tar, index.samples, prepare, num_threads, ahead), index.skipped


def decode_pair(pair: RawPair) -> Pair:
    """Decode a pair's image, or raise a [`SampleError`]."""
    return Pair(pair.key, pair.uid, decode_image(pair.image), pair.caption)


def check_sides(image: Image.Image) -> None:
    """Raise `image_too_large` for an image that is too narrow to be resized."""
    if max(image.size) >= MAX_ASPECT_RATIO * min(image.size):
        raise SampleError("image_too_large", f"{image.width}x{image.height} pixels are too narrow to be resized")


def read_pairs(
    tar: Path,
    samples: Sequence[Sample],
    prepare: Callable[[RawPair], Any],
    num_threads: int = 0,
    ahead: int = 0,
    needs_caption: bool = True,
) -> Iterator[PreparedSample]:
    """Read some samples of a tar, in order; `prepare` is applied to each, and its [`SampleError`] becomes the reason.

    `num_threads` read and prepare, 0 the caller's alone; so many samples are `ahead` of the one that is returned.
    Where no caption is needed, that of a sample without a usable one is empty.
    """
    with open_file(tar, whole=True) as file:
        read = functools.partial(_prepare, file, tar_name=tar.name, prepare=prepare, needs_caption=needs_caption)
        yield from map_ahead(read, samples, num_threads, ahead)


def map_ahead(function: Callable[[Any], Any], items: Iterable[Any], num_threads: int, ahead: int) -> Iterator[Any]:
    """What a function makes of each item, in order, by threads that are so many items ahead; 0: the caller's alone."""
    if not num_threads:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error nobody wants the rest


def _prepare(
    file: OpenFile, sample: Sample, tar_name: str, prepare: Callable[[RawPair], Any], needs_caption: bool
) -> PreparedSample:
    metadata = read_json(file, sample)
    uid = sample_uid(metadata, tar_name, sample.key)
    try:
        if has_bad_uid(metadata):
            raise SampleError("bad_uid", f"a uid has 32 hex digits, that of {sample.key} has not")
        extension, caption = _image_and_caption(file, sample, needs_caption)
        image = read_member(file, f"{sample.key}.{extension}", *sample.members[extension])
        return PreparedSample(sample.key, uid, prepare(RawPair(sample.key, uid, image, caption)), None)
    except SampleError as error:
        return PreparedSample(sample.key, uid, None, error.reason)


def _image_and_caption(file: OpenFile, sample: Sample, needs_caption: bool) -> tuple[str, str]:
    """The extension of a sample's image, and its caption."""
    try:
        ((extension, *_), _), caption = caption_members(file, sample, videos=())
        return extension, caption
    except SampleError as error:
        found = next((extension for extension in IMAGE_EXTENSIONS if sample.members.get(extension, (0, 0))[1]), None)
        if needs_caption or found is None or error.reason not in _WITHOUT_CAPTION:
            raise
        return found, ""
