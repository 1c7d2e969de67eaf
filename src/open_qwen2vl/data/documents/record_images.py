"""The images and videos of records: where each is, found when planned and read again.

in the record         its bytes, or base64                    root null
of its own            a member of its tar, or a file in the folder of its table        root -1
--images              folders, tars and zips (image_files.py)                          their number
"""

import posixpath
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ...families.interface import Media
from ...places import Place, is_remote
from ...processing.media_records import Video, refuse_url
from ...processing.sample_error import SampleError
from ..storage.image_files import ImageFiles
from ..storage.tars import (
    ANIMATIONS,
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Sample,
    most_media_bytes,
    split_member_name,
)
from .records import OWN, TABLES, TAR, Found, OwnImage, RecordReader
from .texts import image_bytes


class PlannedImage(NamedTuple):
    """An image or video of a document: its location, `root` None in the record itself, and what its header says."""

    root: int | None
    offset: int = 0
    size: int = 0
    width: int = 0  # upright; 0 if not known
    height: int = 0
    frames: int = 0  # of a video
    fps: float = 0.0

    @property
    def media(self) -> Media:
        """As the family knows it."""
        if self.frames:
            return Media("video", self.width, self.height, self.frames, self.fps)
        return Media("image", self.width, self.height)


class RecordImages:
    """The images of a plan's records, for one process; `roots` are the plan's `images`."""

    def __init__(self, folder: Place, paths: Sequence[str], roots: list[dict[str, Any]], records: RecordReader):
        self._paths, self._roots, self._records = paths, roots, records
        self._images = ImageFiles(folder, roots)
        self._beside = lru_cache(64)(lambda shard: ImageFiles(Path(paths[shard]).parent, [{"path": "."}]))

    def find(self, shard: int, found: Found, reference: Any, samples: dict[str, Sample] | None) -> PlannedImage:
        """Where an image or video is; no byte of it is read. The frames of a video may stand in its place."""
        try:
            return self._find(shard, found, reference, samples)
        except SampleError as error:
            if error.reason != "missing_image" or (frames := _frames_name(reference)) is None:
                raise
        try:
            return self._find(shard, found, frames, samples)
        except SampleError:
            raise SampleError("missing_image", f"there is neither {_name(reference)} nor {frames}") from None

    def _find(self, shard: int, found: Found, reference: Any, samples: dict[str, Sample] | None) -> PlannedImage:
        reference = file_of(reference)
        if isinstance(reference, OwnImage):
            return PlannedImage(OWN, *reference)
        if isinstance(reference, dict) and (reference.get("bytes") is not None or "image_base64" in reference):
            return PlannedImage(None)
        name = _name(reference)
        refuse_url(name)
        if samples is not None:
            own = _own_member(samples, found.key, name)
            if own is None and not self._roots:
                raise SampleError("missing_image", f"there is no member {name}")
            if own is not None:
                return own
        # Beside its table, unless folders were named: then those alone count. A bucket's have to be named: see there.
        if not self._roots and self._paths[shard].endswith(TABLES) and not is_remote(self._paths[shard]):
            return PlannedImage(OWN, *self._beside(shard).find(name)[1:])
        return PlannedImage(*self._images.find(name))

    def read(self, document: dict[str, Any], reference: Any, location: PlannedImage) -> bytes:
        """The file of an image or video, as the plan has it."""
        return self._read(document["shard"], document["key"], reference, location, None)

    def header(
        self, shard: int, found: Found, reference: Any, location: PlannedImage
    ) -> Callable[[int | None], bytes]:
        """What gives the first bytes of an image or video, or all."""
        return lambda limit: self._read(shard, found.key, reference, location, limit)

    def _read(self, shard: int, key: str, reference: Any, location: PlannedImage, limit: int | None) -> bytes:
        try:
            return self._read_by_name(shard, key, reference, location, limit)
        except SampleError as error:
            # Under the name of its frames, as it was found.
            if error.reason not in ("missing_image", "moved_member") or (frames := _frames_name(reference)) is None:
                raise
            return self._read_by_name(shard, key, frames, location, limit)

    def _read_by_name(self, shard: int, key: str, reference: Any, location: PlannedImage, limit: int | None) -> bytes:
        if location.root is None:
            content = image_bytes(reference)
            if not content:
                raise SampleError("missing_image", "the record has no bytes of an image")
            return content[:limit]
        if location.root != OWN:
            return self._images.read(_name(reference), (location.root, location.offset, location.size), limit)
        if self._paths[shard].endswith(TAR):
            names = _own_names(key, reference)
            return self._records.read_image(shard, names, location.offset, location.size, limit)
        return self._beside(shard).read(_name(reference), (0, location.offset, location.size), limit)


def file_of(reference: Any) -> Any:
    """What stands for the file of an image or of a video."""
    return reference.file if isinstance(reference, Video) else reference


def image_name(reference: Any) -> str:
    """What an image is called in messages."""
    reference = file_of(reference)
    if isinstance(reference, OwnImage):
        return "its image"
    return reference if isinstance(reference, str) else str(reference.get("path") or "an image in the record")


def _name(reference: Any) -> str:
    reference = file_of(reference)
    name = reference.get("path") if isinstance(reference, dict) else reference
    if not isinstance(name, str):
        raise SampleError("missing_image", "an image is not named by a path, as it was when planned")
    return name


def _frames_name(reference: Any) -> str | None:
    """What the frames of a video that is named by a path are called."""
    if not isinstance(reference, Video) or isinstance(reference.file, OwnImage):
        return None
    name = _name(reference)
    stem, dot, extension = name.rpartition(".")
    return f"{stem}.frames" if dot and extension.lower() in (*VIDEO_EXTENSIONS, *ANIMATIONS) else None


def _own_names(key: str, reference: Any) -> list[str]:
    """What an image may be called in the tar: `KEY.` before its name, in the sample's folder, or as it is."""
    if isinstance(file_of(reference), OwnImage):
        # Those of videos first: the first name says how large it may be.
        extensions = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS) if isinstance(reference, Video) else IMAGE_EXTENSIONS
        return [f"{key}.{extension}" for extension in extensions]
    name = _name(reference)
    return [f"{key}.{name}", posixpath.join(posixpath.dirname(key), name), name]


def _own_member(samples: dict[str, Sample], key: str, name: str) -> PlannedImage | None:
    for named in map(split_member_name, _own_names(key, name)):
        sample = samples.get(named[0]) if named else None
        found = sample.members.get(named[1]) if sample else None
        if found is None:
            continue
        if not 0 < found[1] <= most_media_bytes(name):
            raise SampleError("image_too_large" if found[1] else "empty_image", f"{name}: {found[1]} bytes")
        return PlannedImage(OWN, *found, *sample.image_sizes.get(named[1], ()))
    return None
