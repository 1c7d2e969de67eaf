"""Whole files and folders to and from where they lie; nothing of this is asked where a place is of this machine."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .places import Place, filesystem, is_remote, list_tree, place, remote_errors_named

_AT_ONCE = 8  # files that are copied side by side


def make_folder(folder: Place) -> None:
    """Make a folder with those that it lies in; in a bucket there are none to be made."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def upload(source: Path, target: Place) -> None:
    """Copy a whole file to a bucket, where it is not seen before its last byte is there."""
    with remote_errors_named(target):
        filesystem(str(target)).put_file(str(source), str(target))


def remove_tree(folder: Place) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with remote_errors_named(folder), contextlib.suppress(FileNotFoundError):
        filesystem(str(folder)).rm(str(folder), recursive=True)


def fetch_file(source: str | Place, target: Path) -> None:
    """Copy a remote file to one of this machine."""
    with remote_errors_named(source):
        filesystem(str(source)).get_file(str(source), str(target))


def fetch_all(paths: Sequence[Place], folder: Path) -> list[Path]:
    """Files of this machine as they are, and copies of remote ones, each in a folder of its own within `folder`."""

    def fetch(number: int, path: Place) -> Path:
        if not is_remote(path):
            return path
        copy = folder / f"{number:05d}" / path.name
        copy.parent.mkdir(parents=True)
        fetch_file(path, copy)
        return copy

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(fetch, range(len(paths)), paths))


def fetch_tree(folder: str | Place, target: Path) -> None:
    """Copy the files below a remote folder into one of this machine."""

    def fetch(name: str) -> None:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        fetch_file(f"{folder}/{name}", target / name)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(fetch, [name for name, _ in list_tree(str(folder))]))


@contextlib.contextmanager
def local_copy(path: str | Place) -> Iterator[Path]:
    """A file as one of this machine: itself, or a copy that is gone at the end of the block (what is mapped stays)."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="open-qwen2vl-") as folder:
        copy = Path(folder) / place(path).name
        fetch_file(path, copy)
        yield copy
