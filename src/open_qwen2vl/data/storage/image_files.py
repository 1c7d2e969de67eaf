"""Images that records name by a path: in folders, uncompressed tars and zips.

    names of all archives ── index_archives ──► image-index.RANK.{key,location}.npy, sorted by hash, memory-mapped
    a name ── ImageFiles.find ──► location (root, offset, size), kept in the plan ── ImageFiles.read ──► bytes

Folders are looked at first. A name is a path inside of a root, perhaps an absolute one: others, `..` and links that
leave the folder are refused. An archive's member is read by its offset, and only if it still has its name. A folder of
a bucket is listed once, as an archive is: to ask for each name would be a request each.
"""

import contextlib
import functools
import hashlib
import logging
import os
import posixpath
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...files import describe_shard, described_path, os_errors_named, renamed_when_whole, shard_path
from ...places import OpenFile, Place, is_remote, list_tree, open_file, place, remote_errors_named
from ...processing.sample_error import SampleError
from .open_files import Newest, check_mapped, map_array
from .tars import MAX_VIDEO_BYTES, list_files, most_media_bytes, read_member
from .zips import list_members, read_zip_member

logger = logging.getLogger(__name__)

INDEX_NAME = "image-index"
_SORTED_AT_ONCE = 1 << 16
_LOCATION = np.dtype([("root", "<i4"), ("offset", "<i8"), ("size", "<i8")])
_COLUMNS = {"key": np.dtype("<u8"), "location": _LOCATION}
_ENTRY = struct.Struct("<Qiqq")  # hash of the name, then a location


class ImageLocation(NamedTuple):
    """Where an image is."""

    root: int  # index into the list of folders and archives
    offset: int  # of a tar's member its data, of a zip's its header; 0 in a folder
    size: int  # bytes in the file, compressed ones of a zip


def describe_images(images: Sequence[str | Place], folder: Place) -> list[dict[str, Any]]:
    """What a plan remembers of image folders and archives; a `ValueError` for what is none that can be read."""
    described = []
    for path in map(place, images):
        with remote_errors_named(path):
            is_folder = path.is_dir()
            if not is_folder and not (path.is_file() and path.suffix in (".tar", ".zip")):
                raise ValueError(f"{path}: images are read from folders, .tar and .zip files (unpack compressed tars)")
        described.append({"path": described_path(path, folder)} if is_folder else describe_shard(path, folder))
    return described


def index_archives(folder: Place, images: Sequence[dict[str, Any]]) -> None:
    """Write the index of all archives' members, if there are archives: 16 bytes of memory for each, once."""
    remove_index(folder)
    paths = {number: shard_path(folder, root) for number, root in enumerate(images)}
    archives = {number: path for number, path in paths.items() if "size" in images[number] or is_remote(path)}
    if not archives:
        return
    with tempfile.TemporaryDirectory(dir=None if is_remote(folder) else folder, prefix=f"{_own_index()}.") as scratch:
        _write_index(folder, archives, Path(scratch) / "raw")


def _write_index(folder: Place, archives: dict[int, str], raw: Path) -> None:
    with os_errors_named(raw), open(raw, "wb") as file:
        for number, path in archives.items():
            file.writelines(_ENTRY.pack(_hash(name), number, offset, size) for name, offset, size in _members(path))
    entry = np.dtype([("key", "<u8"), *_LOCATION.descr])
    entries = np.memmap(raw, entry, "r") if raw.stat().st_size else np.empty(0, entry)
    order = np.argsort(entries["key"], kind="stable")  # of two members with one name the first is found
    for name, dtype in _COLUMNS.items():
        fields = list(dtype.names) if dtype.names else name
        # Written, not mapped: on a full disk a map would end the process.
        with renamed_when_whole(_index_path(folder, name)) as temporary, open(temporary, "wb") as file:
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype))
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (len(entries),)})
            for start in range(0, len(entries), _SORTED_AT_ONCE):
                file.write(entries[order[start : start + _SORTED_AT_ONCE]][fields].astype(dtype).tobytes())


def remove_index(folder: Place, of_all_ranks: bool = False) -> None:
    """Remove what [`index_archives`] wrote, and what a killed run left of it."""
    for path in folder.glob(f"{INDEX_NAME if of_all_ranks else _own_index()}.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class ImageFiles:
    """The images of a plan, for one process; `images` is from [`describe_images`]."""

    def __init__(self, folder: Place, images: Sequence[dict[str, Any]]):
        paths = {number: shard_path(folder, root) for number, root in enumerate(images)}
        self._folder = folder
        self._archives = {number: path for number, path in paths.items() if "size" in images[number]}
        self._remote_folders = {
            number: path for number, path in paths.items() if number not in self._archives and is_remote(path)
        }
        self._folders = {
            number: os.path.realpath(path)
            for number, path in paths.items()
            if number not in self._archives and number not in self._remote_folders
        }
        self._files = Newest(lambda number: open_file(self._archives[number]))
        self._real_folder = functools.lru_cache(1024)(os.path.realpath)

    def find(self, name: str) -> ImageLocation:
        """Where the image of a path inside of a folder or archive is; a [`SampleError`] if nowhere."""
        if not self._folders and not self._archives and not self._remote_folders:
            raise ValueError(
                f"a record names the image {name}, but no folder or archive of images was given (--images)"
            )
        found = self._find(_checked_name(name))
        if found is None:
            raise SampleError("missing_image", f"there is no image {name}")
        if not 0 < found.size <= most_media_bytes(name):
            raise SampleError("image_too_large" if found.size else "empty_image", f"{name} has {found.size} bytes")
        return found

    def read(self, name: str, location: Sequence[int], limit: int | None = None) -> bytes:
        """The file of an image that `find` found, or its first `limit` bytes; or a [`SampleError`]."""
        location = ImageLocation(*location)
        if location.root in self._archives:
            file = self._files[location.root]
            if self._archives[location.root].endswith(".zip"):
                most = most_media_bytes(name)
                return read_zip_member(file, _checked_name(name), location.offset, location.size, most, limit)
            return _read_tar_member(file, _checked_name(name), location, limit)
        if location.root in self._remote_folders:
            return self._read_object(_checked_name(name), location, limit)
        path = self._path_in_folder(location.root, _checked_name(name))
        try:
            found = os.stat(path).st_size
            if found != location.size and most_media_bytes(name) == MAX_VIDEO_BYTES:
                # Of an image the size in pixels is compared; the frames of a video would have to be counted again.
                raise SampleError("video_changed", f"{name} has {found} bytes, planned {location.size}")
            if found > most_media_bytes(name):
                raise SampleError("image_too_large", f"{name} is larger than {most_media_bytes(name)} bytes")
            with open(path, "rb", buffering=0) as file:
                return file.read() if limit is None else file.read(limit)
        except OSError as error:
            raise SampleError("missing_image", f"{name}: {error}") from error

    def _read_object(self, name: str, location: ImageLocation, limit: int | None) -> bytes:
        file = open_file(f"{self._remote_folders[location.root]}/{name}")
        try:
            if file.size != location.size:
                raise SampleError("image_changed", f"{name} has {file.size} bytes, planned {location.size}")
            return file.read_at(file.size if limit is None else limit, 0)
        except FileNotFoundError as error:
            raise SampleError("missing_image", f"{name}: {error}") from error

    def _find(self, name: str) -> ImageLocation | None:
        is_inside = not name.startswith("/")
        for number in self._folders:
            try:
                path = self._path_in_folder(number, name)
            except SampleError:
                if name.startswith("/"):
                    continue  # it may be in another one
                raise
            is_inside = True
            with contextlib.suppress(OSError):
                status = os.stat(path)
                if stat.S_ISREG(status.st_mode):
                    return ImageLocation(number, 0, status.st_size)
        if not is_inside:
            raise SampleError("unsafe_image_path", f"{name} is in none of the images' folders")
        if not self._archives and not self._remote_folders:
            return None
        keys, locations = self._index
        check_mapped(keys)
        check_mapped(locations)
        key = np.uint64(_hash(name))
        row = int(np.searchsorted(keys, key))
        return ImageLocation(*locations[row].item()) if row < len(keys) and keys[row] == key else None

    @functools.cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        keys, locations = (map_array(_index_path(self._folder, name)) for name in _COLUMNS)
        if (
            (keys.dtype, locations.dtype) != tuple(_COLUMNS.values())
            or keys.ndim != 1
            or keys.shape != locations.shape
        ):
            raise ValueError(f"{self._folder}: its index of images is damaged; run open-qwen2vl pack again")
        return keys, locations

    def _path_in_folder(self, number: int, name: str) -> str:
        """The path of a name in a folder, which it may not leave by a link."""
        root = self._folders[number]
        parent, base = os.path.split(os.path.join(root, name))
        path = os.path.join(self._real_folder(parent), base)
        if os.path.islink(path):
            path = os.path.realpath(path)
        if os.path.commonpath([root, path]) != root:
            what = "not inside of" if name.startswith("/") else "a link that leaves"
            raise SampleError("unsafe_image_path", f"{name} is {what} {root}")
        return path


def _checked_name(name: str) -> str:
    if ".." in name.split("/") or "\0" in name or not _is_unicode(name):
        raise SampleError("unsafe_image_path", f"{name} is no path inside of the images' folder")
    return posixpath.normpath(name)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _index_path(folder: Place, name: str) -> Place:
    return folder / f"{_own_index()}.{name}.npy"


def _own_index() -> str:
    """Each rank of `accelerate launch` has its own; its workers, who inherit the environment, read that."""
    return f"{INDEX_NAME}.{os.environ.get('RANK', 0)}"


def _members(path: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the files of an archive, or of a folder of a bucket."""
    if not path.endswith((".tar", ".zip")):
        yield from ((name, 0, known["size"]) for name, known in list_tree(path))
        return
    try:
        for name, offset, size in (list_members if path.endswith(".zip") else list_files)(path):
            yield posixpath.normpath(name), offset, size
    except SampleError as error:
        logger.warning("%s; what follows there is missing", error)


def _read_tar_member(file: OpenFile, name: str, location: ImageLocation, limit: int | None) -> bytes:
    # `tar -C folder .` names them with a dot.
    return read_member(file, (name, f"./{name}"), location.offset, location.size, limit)
