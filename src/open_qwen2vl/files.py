"""Files and folders that are there as a whole or not at all, and what is remembered of a file.

What is written goes to `NAME.PID.tmp`, is synced to the disk and renamed; its folder is synced after that, so that a
power cut leaves the old one or the new one. What a killed run leaves is removed by the next run. In a bucket nothing
can be renamed: there a file is written on this machine (`TMPDIR`) and uploaded, and it is seen when that is complete.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .places import Place, identities, identity, is_remote, open_stream
from .transfers import upload

_PATHS = 256  # that one process keeps


@contextlib.contextmanager
def renamed_when_whole(path: Place, keep_suffix: bool = False) -> Iterator[Path]:
    """A temporary file of this machine, which gets its name at the end of the block; what is there is replaced.

    `keep_suffix` ends the temporary name in the file's own suffix, for writers that go by it.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="open-qwen2vl-") as folder:
            yield Path(folder) / path.name
            upload(Path(folder) / path.name, path)
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp{path.suffix if keep_suffix else ''}")
    try:
        with os_errors_named(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to that gets its name only when the block ends well; a `ValueError` if there is one."""
    if path.exists():
        raise ValueError(f"{path} exists; give a new folder")
    remove_temporaries([path])
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with os_errors_named(path):
            temporary.mkdir(parents=True)
            yield temporary
            publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(staged: Path, final: Path, trash: str = ".deleted") -> None:
    """Give a folder that is whole its name; it is synced first, and what has the name is removed by way of `trash`."""
    for folder, _, names in os.walk(staged):
        for name in names:
            sync(os.path.join(folder, name))
        sync(folder)
    if final.exists():
        remove_folder(final, trash)
    os.replace(staged, final)
    sync(final.parent)


def remove_folder(folder: Path, trash: str = ".deleted") -> None:
    """Remove a folder under another name beside it, so that none is ever half there."""
    renamed = folder.with_name(trash)
    shutil.rmtree(renamed, ignore_errors=True)
    os.replace(folder, renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def write_text(path: Place, text: str) -> None:
    """Write a file of UTF-8 as a whole."""
    with renamed_when_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Place, content: Any, **options: Any) -> None:
    """Write a JSON file as a whole; `options` are those of `json.dumps`."""
    write_text(path, json.dumps(content, **{"indent": 1, **options}) + "\n")


def remove_temporaries(paths: Iterable[Place]) -> None:
    """Remove what a killed run left of files or folders with these names; their folders need not exist."""
    names: dict[Path, set[str]] = {}
    for path in paths:
        if is_remote(path):  # it is not there before it is whole
            continue
        names.setdefault(path.parent, set()).add(path.name)
    for folder, whole in names.items():
        for temporary in folder.glob("*.tmp*"):
            name, end, suffix = temporary.name.rpartition(".tmp")
            name = name.rpartition(".")[0]
            if end and name in whole and suffix in ("", Path(name).suffix):
                shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def sync(path: str | os.PathLike) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not os.path.isdir(path):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def os_errors_named(path: str | os.PathLike) -> Iterator[None]:
    """Give an `OSError` of the block that names no file, as that of a full disk, this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def describe_shard(shard: str | Place, folder: Place) -> dict[str, Any]:
    """What is remembered of a file: `path`, `size` in bytes and `mtime_ns`, or `etag` in a bucket.

    The path is relative to a folder (posix); it is the URL of what is remote, and absolute for a remote folder.
    """
    return {"path": described_path(shard, folder), **identity(shard)}


def describe_shards(shards: Sequence[str | Place], folder: Place) -> list[dict[str, Any]]:
    """[`describe_shard`] of many; those of a folder of a bucket cost a listing, not a request each."""
    found = []
    for shard, known in zip(shards, identities(shards), strict=True):
        if known is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(shard))
        found.append({"path": described_path(shard, folder), **known})
    return found


def described_path(shard: str | Place, folder: Place) -> str:
    """How a file or folder is named for a folder: see [`describe_shard`]."""
    if is_remote(shard):
        return str(shard)
    # The file's own name is kept even if it is a link; its folder is resolved, for `..` means nothing across links.
    resolved = Path(shard).parent.resolve() / Path(shard).name
    return str(resolved) if is_remote(folder) else Path(os.path.relpath(resolved, folder.resolve())).as_posix()


def shard_path(folder: str | Place, shard: dict[str, Any]) -> str:
    """The absolute path, or URL, of a file that [`describe_shard`] described for this folder."""
    if is_remote(shard["path"]) or is_remote(folder):
        return shard["path"]
    return os.path.normpath(os.path.join(os.path.realpath(folder), shard["path"]))


class ShardPaths(Sequence):
    """The absolute paths of files that [`describe_shard`] described, made when they are asked for."""

    def __init__(self, folder: Place, shards: Sequence[dict[str, Any]]):
        self._shards = shards
        self._path = functools.lru_cache(_PATHS)(lambda number: shard_path(folder, shards[number]))

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> str:
        return self._path(number)


def content_hash(path: str | Place) -> str:
    """SHA-256 of a file, in hex; a `ValueError` for a pipe, which nobody may ever write to."""
    if not is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: no regular file")
    with open_stream(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
