"""One process at a time writes an output: a lock file, which is free again as soon as its process is gone.

A bucket has no such locks. The lock of an output there lies on this machine (`TMPDIR`): it keeps this user's processes
apart, not those of several machines. Two of these with the same command write the same bytes; that no other command
writes there is for the user to see to.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from .places import Place, filesystem, is_remote, remote_errors_named

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system


class FolderInUse(ValueError):
    """Another process writes there."""


@contextlib.contextmanager
def only_writer(
    output: str | Place,
    doing: str = "writing",
    *,
    is_file: bool = False,
    patience: float = 1,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[None]:
    """Hold the lock of an output; `FolderInUse`, which names its process, if another holds it for `patience` seconds.

    The lock of a folder lies in it, that of a file beside it. Of several ranks each holds a part, so that they work
    side by side, but not beside another run. A bucket is asked whether it is there.
    """
    if is_remote(output):
        check_store(str(output))
    path = _lock_path(output, is_file)
    if blocking := next((folder for folder in (path.parent, *path.parent.parents) if folder.is_file()), None):
        raise ValueError(f"{output}: {blocking} is a file, not a folder")
    if is_file and not is_remote(output) and Path(output).is_dir():
        raise ValueError(f"{output} is a folder; a file is to be written")
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Bytes of the file stand for ranks; one process alone takes all that there could be.
    length = 1 if ranks > 1 else 0
    file = _wait_for(path, f"is {doing} {output}", patience, rank, length)
    try:
        if rank == 0:
            os.ftruncate(file.fileno(), 0)
            os.pwrite(file.fileno(), str(os.getpid()).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):  # other ranks are still at work
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        file.close()
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()  # nothing was written


def check_store(url: str) -> None:
    """Ask a store once, before any work: an `OSError` with the URL where it fails, a `ValueError` without a bucket."""
    store, parts = filesystem(url), urlsplit(url)
    with remote_errors_named(url, library_alone=True):
        try:
            store.find(f"{url}/{LOCK_NAME}")  # a folder that is yet to be made is no error
            return
        except FileNotFoundError:
            there = store.exists(f"{parts.scheme}://{parts.netloc}")
    if not there:
        raise ValueError(f"{url}: there is no such bucket or repository")


def _lock_path(output: str | Place, is_file: bool) -> Path:
    if is_remote(output):
        return local_state(output) / LOCK_NAME
    output = Path(output)
    return output.with_name(f".{output.name}{LOCK_NAME}") if is_file else output / LOCK_NAME


def local_state(output: str | Place) -> Path:
    """The folder on this machine for what a bucket cannot hold of an output: its lock, or a file that grows."""
    digest = hashlib.sha256(str(output).rstrip("/").encode()).hexdigest()[:32]
    return Path(tempfile.gettempdir(), f"open-qwen2vl-{os.getuid()}", digest)


def _wait_for(path: Path, what: str, patience: float, rank: int, length: int) -> BinaryIO:
    give_up, told = time.monotonic() + patience, False
    while True:
        file = open(path, "a+b", buffering=0)
        try:
            # POSIX locks belong to the process alone: workers that it forks do not keep them.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, rank)
        except OSError as error:
            file.seek(0)
            holder = file.read().decode(errors="replace") or "unknown"
            if error.errno in _NO_LOCKS:
                logger.warning("%s: no locks here (%s); run one process at a time", path.parent, error.strerror)
                return file
            file.close()
            if error.errno not in _HELD:
                raise
            if time.monotonic() > give_up:
                raise FolderInUse(f"process {holder} {what}: wait for it or stop it") from None
            if not told:
                logger.warning("waiting for process %s, which %s", holder, what)
                told = True
            time.sleep(0.1)
            continue
        # The last holder removes the file: one that is opened before that and locked after it locks nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()
