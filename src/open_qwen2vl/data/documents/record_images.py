"""The images of records: where each is, found when planned and read again.

in the record         its bytes, or base64                    root null
of its own            a member of its tar, or a file in the folder of its table        root -1
--images              folders, tars and zips (image_files.py)                          their number
"""

import posixpath
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ...processing.conversation_records import refuse_url
from ...processing.sample_error import SampleError
from ..storage.image_files import MAX_IMAGE_BYTES, ImageFiles
from ..storage.image_sizes import upright_size
from ..storage.tars import IMAGE_EXTENSIONS, Sample, read_member, split_member_name
from .records import TABLES, TAR, Found, OwnImage, RecordReader
from .texts import image_bytes

OWN = -1


class PlannedImage(NamedTuple):
    """An image of a document: its location, `root` None in the record itself, and its upright size, 0 if not known."""

    root: int | None
    offset: int = 0
    size: int = 0
    width: int = 0
    height: int = 0


class RecordImages:
    """The images of a plan's records, for one process; `roots` are the plan's `images`."""

    def __init__(self, folder: Path, paths: list[str], roots: list[dict[str, Any]], records: RecordReader):
        self._paths, self._roots, self._records = paths, roots, records
        self._images = ImageFiles(folder, roots)
        self._beside = lru_cache(64)(lambda shard: ImageFiles(Path(paths[shard]).parent, [{"path": "."}]))

    def find(self, shard: int, found: Found, reference: Any, samples: dict[str, Sample] | None) -> PlannedImage:
        """Where an image is; no byte of it is read."""
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
        # Beside its table, unless folders were named: then those alone count.
        if not self._roots and self._paths[shard].endswith(TABLES):
            return PlannedImage(OWN, *self._beside(shard).find(name)[1:])
        return PlannedImage(*self._images.find(name))

    def read(self, document: dict[str, Any], reference: Any, location: dict[str, Any]) -> bytes:
        """The file of an image, as the plan has it."""
        return self._read(document["shard"], document["key"], reference, PlannedImage(**location), None)

    def size(self, shard: int, found: Found, reference: Any, location: PlannedImage) -> tuple[int, int]:
        """Upright width and height from an image's header."""
        return upright_size(lambda limit: self._read(shard, found.key, reference, location, limit))

    def _read(self, shard: int, key: str, reference: Any, location: PlannedImage, limit: int | None) -> bytes:
        if location.root is None:
            content = image_bytes(reference)
            if not content:
                raise SampleError("missing_image", "the record has no bytes of an image")
            return content[:limit]
        if location.root != OWN:
            return self._images.read(_name(reference), (location.root, location.offset, location.size), limit)
        if self._paths[shard].endswith(TAR):
            names = _own_names(key, reference)
            return read_member(self._records.files[shard].fileno(), names, location.offset, location.size, limit)
        return self._beside(shard).read(_name(reference), (0, location.offset, location.size), limit)


def image_name(reference: Any) -> str:
    """What an image is called in messages."""
    if isinstance(reference, OwnImage):
        return "its image"
    return reference if isinstance(reference, str) else str(reference.get("path") or "an image in the record")


def _name(reference: Any) -> str:
    name = reference.get("path") if isinstance(reference, dict) else reference
    if not isinstance(name, str):
        raise SampleError("missing_image", "an image is not named by a path, as it was when planned")
    return name


def _own_names(key: str, reference: Any) -> list[str]:
    """What an image may be called in the tar: `KEY.` before its name, in the sample's folder, or as it is."""
    if isinstance(reference, OwnImage):
        return [f"{key}.{extension}" for extension in IMAGE_EXTENSIONS]
    name = _name(reference)
    return [f"{key}.{name}", posixpath.join(posixpath.dirname(key), name), name]


def _own_member(samples: dict[str, Sample], key: str, name: str) -> PlannedImage | None:
    for named in map(split_member_name, _own_names(key, name)):
        sample = samples.get(named[0]) if named else None
        found = sample.members.get(named[1]) if sample else None
        if found is None:
            continue
        if not 0 < found[1] <= MAX_IMAGE_BYTES:
            raise SampleError("image_too_large" if found[1] else "empty_image", f"{name}: {found[1]} bytes")
        return PlannedImage(OWN, *found, *sample.image_sizes.get(named[1], ()))
    return None
