"""From a tar to its pairs of image and caption: members are read and prepared by threads, ahead of who scores them."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ...places import OpenFile, open_file
from ...processing.images import decode_image
from ...processing.sample_error import SampleError
from ..documents.records import caption_members
from ..storage.tars import Sample, has_bad_uid, read_json, read_member, sample_uid


class RawPair(NamedTuple):
    """A sample as it stands in its tar."""

    key: str  # of the sample
    uid: str  # 32 lower-case hex digits
    image: bytes  # the image file
    caption: str  # not empty, unchanged


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


def decode_pair(pair: RawPair) -> Pair:
    """Decode a pair's image, or raise a [`SampleError`]."""
    return Pair(pair.key, pair.uid, decode_image(pair.image), pair.caption)


def read_pairs(
    tar: Path, samples: Sequence[Sample], prepare: Callable[[RawPair], Any], num_threads: int = 0, ahead: int = 0
) -> Iterator[PreparedSample]:
    """Read some samples of a tar, in order; `prepare` is applied to each, and its [`SampleError`] becomes the reason.

    `num_threads` read and prepare, 0 the caller's alone; so many samples are `ahead` of the one that is returned.
    """
    with open_file(tar, whole=True) as file:
        if not num_threads:
            yield from (_prepare(file, tar.name, sample, prepare) for sample in samples)
            return
        with ThreadPoolExecutor(num_threads) as pool:
            waiting: deque = deque()
            for sample in samples:
                waiting.append(pool.submit(_prepare, file, tar.name, sample, prepare))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def _prepare(file: OpenFile, tar_name: str, sample: Sample, prepare: Callable[[RawPair], Any]) -> PreparedSample:
    metadata = read_json(file, sample)
    uid = sample_uid(metadata, tar_name, sample.key)
    try:
        if has_bad_uid(metadata):
            raise SampleError("bad_uid", f"a uid has 32 hex digits, that of {sample.key} has not")
        ((extension, *location), _), caption = caption_members(file, sample, videos=())
        image = read_member(file, f"{sample.key}.{extension}", *location)
        return PreparedSample(sample.key, uid, prepare(RawPair(sample.key, uid, image, caption)), None)
    except SampleError as error:
        return PreparedSample(sample.key, uid, None, error.reason)
