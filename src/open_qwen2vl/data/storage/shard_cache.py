"""Whole shards of a bucket on a local disk, those read last, shared by the processes of a machine.

    URL, ETag ──► FOLDER/HASH.shard    there: it counts as read now, and is opened
                      ▲                not there: the process that has its lock fetches it, others wait for that
                      └── large ranges, several at a time ◄── bucket
    more than `max_bytes` ──► what was read longest ago goes; who has it open reads on

A shard that is fetched has the size of the bucket's and, where the ETag is one, its MD5.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...files import remove_temporaries, renamed_when_whole
from ...places import LocalFile, RemoteFile, read_ranges

logger = logging.getLogger(__name__)

CHUNK = 16 << 20  # bytes of a request
CHUNKS = 4  # requests at a time
COPIES = 3  # of a shard, until its MD5 is that of the bucket, or the same again
LOCKS = 64  # files; a shard's is chosen by its name
_SUFFIX = ".shard"
_MD5 = re.compile("[0-9a-f]{32}")


class ShardCache:
    """A folder of shards. Any number of processes may use it at a time, each with the same `max_bytes`."""

    def __init__(self, folder: str | os.PathLike, max_bytes: int):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._wanted: deque[tuple[str, dict[str, Any]]] = deque(maxlen=1024)
        self._fetching: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def open(self, url: str, identity: dict[str, Any]) -> LocalFile:
        """The copy of a shard, fetched if it is not there; `identity` is its `size` and `etag`.

        Raises:
            OSError: if it cannot be fetched, is another one than `identity` says, or larger than the whole cache.
        """
        path = self._path(url, identity)
        while True:
            with contextlib.suppress(FileNotFoundError):
                file = LocalFile(path, "rb")
                with contextlib.suppress(FileNotFoundError):  # it may go at any time, and can be read all the same
                    os.utime(path)
                return file
            self._fetch(url, identity, path)

    def fetch_ahead(self, shards: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Fetch shards in a thread, in their order; what fails is left to [`open`]."""
        self._wanted.extend(shards)
        if self._fetching is None or not self._fetching.is_alive():
            self._fetching = threading.Thread(target=self._fetch_wanted, daemon=True)
            self._fetching.start()

    def _fetch_wanted(self) -> None:
        while self._wanted:
            url, identity = self._wanted.popleft()
            path = self._path(url, identity)
            try:
                if not path.exists():
                    self._fetch(url, identity, path)
            except OSError as error:
                logger.warning("not fetched ahead: %s", error)

    def _path(self, url: str, identity: dict[str, Any]) -> Path:
        name = f"{url} {identity['size']} {identity['etag']}"
        return self.folder / (hashlib.sha256(name.encode()).hexdigest()[:32] + _SUFFIX)

    def _fetch(self, url: str, identity: dict[str, Any], path: Path) -> None:
        with self._locked(f"lock-{int(path.stem, 16) % LOCKS:02d}"):
            if path.exists():  # another process has fetched it meanwhile
                return
            remove_temporaries([path])
            with renamed_when_whole(path) as temporary, open(temporary, "wb") as file:
                self._make_room(url, file.fileno(), identity["size"])
                _copy(url, identity, file.fileno())

    def _make_room(self, url: str, file: int, size: int) -> None:
        """Take room for a new file, by its length, which counts from now on; older shards go for it."""
        if size > self.max_bytes:
            raise OSError(f"{url}: its {size:,} bytes are more than the whole cache of {self.max_bytes:,} bytes")
        with self._locked("lock"):
            os.ftruncate(file, size)
            known = []
            for path in self.folder.glob(f"*{_SUFFIX}*"):
                with contextlib.suppress(FileNotFoundError):
                    known.append((path.stat(), path))
            total = sum(stat.st_size for stat, _ in known)
            for stat, path in sorted(known, key=lambda one: one[0].st_mtime_ns):
                if total <= self.max_bytes:
                    break
                if path.suffix == _SUFFIX or not _is_written(path):
                    path.unlink(missing_ok=True)
                    total -= stat.st_size

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        # Of an open file, unlike POSIX locks: threads of one process keep each other out too.
        with open(self.folder / name, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # by name: a process that was forked meanwhile has the file open too


def _is_written(temporary: Path) -> bool:
    """Whether the process that a temporary file is of is there."""
    try:
        os.kill(int(temporary.name.split(".")[-2]), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def _copy(url: str, identity: dict[str, Any], file: int) -> None:
    """Fetch an object into a file of its length, a second time if its MD5 is not its ETag.

    Some ETags look like an MD5 and are none (of encrypted objects): what came twice alike was not damaged on its way.
    """
    seen: set[str] = set()
    for _ in range(COPIES):
        digest = _copy_once(url, identity["size"], file)
        if digest in seen or digest == identity["etag"] or not _MD5.fullmatch(identity["etag"]):
            return
        seen.add(digest)
    raise OSError(f"{url}: other bytes came each of {COPIES} times")


def _copy_once(url: str, size: int, file: int) -> str:
    """The MD5 of what came."""
    remote = RemoteFile(url)
    digest = hashlib.md5(usedforsecurity=False)
    for start in range(0, size, CHUNK * CHUNKS):
        starts = range(start, min(start + CHUNK * CHUNKS, size), CHUNK)
        found = read_ranges([(remote, at, min(at + CHUNK, size)) for at in starts])
        for at, content in zip(starts, found, strict=True):
            if isinstance(content, Exception):
                raise content
            os.pwrite(file, content, at)
            digest.update(content)
    return digest.hexdigest()
