"""Where data lies: a `Path` of this machine, or a URL that fsspec reads (`s3://`, `gs://`, `hf://`, ...).

    place(TEXT) ─► Path                            as ever: nothing of it goes through fsspec
               └─► UPath of universal_pathlib      the same methods: `/`, `name`, `exists`, `glob`, `read_text`, ...
    open_file(PLACE)    reads at a byte, by a request of just that range where it is remote
    identity(PLACE)     size, with `mtime_ns` here and an `etag` in a bucket: what tells that a file is another one

Who may read a bucket is the business of its own library (environment, profile, role, `hf auth login`): a URL with a
secret is refused, so that none can come into a plan, a log or a report. What a library has cached of a listing is not
believed: a plan is compared with what is there now.
"""

import contextlib
import errno
import functools
import io
import os
import re
import threading
from collections import defaultdict
from collections.abc import Awaitable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import pyarrow as pa
    from fsspec import AbstractFileSystem
    from upath import UPath

    Place: TypeAlias = Path | UPath
else:
    Place = Any

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_COMMIT = re.compile("@[0-9a-f]{40}(/|$)")
_SETTINGS = {"use_listings_cache": False}
_ETAGS = ("ETag", "etag", "blob_id", "md5Hash", "generation", "created", "LastModified", "mtime")
_BLOCK = 8 << 20  # bytes of a request where a file is read from its beginning to its end


def is_remote(path: "str | Place") -> bool:
    """Whether a path is a URL of another place than this machine."""
    return _URL.match(str(path)) is not None


def place(path: "str | os.PathLike | Place") -> Place:
    """The place that a path or URL names; a `ValueError` for a URL with a secret, or of a kind that is not known."""
    text = str(path)
    if not is_remote(text):
        return Path(path)
    if text.startswith(("file://", "local://")):
        return Path(text.partition("://")[2])
    parts = urlsplit(text)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc or "=" in parts.query:
        raise ValueError(
            f"{shown}: the URL holds a user, a secret or a signature, which would stand in plans and logs: let the "
            "library find credentials in its own places (environment, profile, role)"
        )
    try:
        from upath import UPath

        filesystem(text)  # its library is imported
        return UPath(text, **_SETTINGS)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{shown}: {' '.join(str(error).split())}") from None


def files_at(path: "str | Place", pattern: str) -> list[Place]:
    """The files of a folder by a pattern, sorted, those of a URL with `*`, which no shell expands; else the place."""
    with remote_errors_named(path):
        found = place(path)
        if is_remote(found) and "*" in str(found):
            scheme = _URL.match(str(found))[0]
            names = map(str, filesystem(str(found)).glob(str(found)))
            return [place(name if is_remote(name) else scheme + name.removeprefix("/")) for name in names]
        return sorted(found.glob(pattern)) if found.is_dir() else [found]


def list_tree(folder: str) -> list[tuple[str, dict[str, Any]]]:
    """The files below a remote folder, as paths in it, sorted, and the [`identity`] of each."""
    with remote_errors_named(folder):
        fs = filesystem(folder)
        start = len(fs._strip_protocol(folder)) + 1
        found = fs.find(folder, detail=True)
    return [(name[start:], _identity(name, info)) for name, info in sorted(found.items())]


def absolute(path: "Place") -> Place:
    """A place that stays the same wherever a process stands."""
    return path if is_remote(path) else Path(os.path.abspath(path))


class LocalFile(io.FileIO):
    """A file of this machine, read at a byte by any number of threads."""

    @functools.cached_property
    def size(self) -> int:
        """Bytes of it when that was first asked."""
        return os.fstat(self.fileno()).st_size

    def read_at(self, size: int, offset: int) -> bytes:
        """Bytes from a place, fewer at its end; an error names the file."""
        try:
            return os.pread(self.fileno(), size, offset)
        except OSError as error:
            error.filename = self.name
            raise


class RemoteFile:
    """An object of a bucket, read at a byte by any number of threads.

    With `whole` it is read from its beginning to its end: requests are large, and bytes between the reads come too.
    """

    def __init__(self, url: str, whole: bool = False):
        self.name, self._whole = url, whole
        with remote_errors_named(url, library_alone=True):
            self._fs = filesystem(url)
        self._path = self._fs._strip_protocol(url)
        self._blocks: dict[int, bytes] = {}  # the last two, by their numbers: threads read a little out of order
        self._lock = threading.Lock()
        # Ranges that were read ahead: first byte, that behind the last, and the bytes, or why there are none.
        self.ahead: list[tuple[int, int, bytes | Exception]] = []

    @functools.cached_property
    def size(self) -> int:
        """Bytes of it when that was first asked."""
        return int(_info(self.name)["size"])

    def read_at(self, size: int, offset: int) -> bytes:
        """Bytes from a place, fewer at its end; an `OSError` names the URL."""
        for start, end, content in self.ahead:
            if start <= offset and offset + size <= end:
                return _bytes_of(content)[offset - start :][:size]
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        if not self._whole or size > _BLOCK:
            return self._fetch(offset, offset + size)
        first, last = offset // _BLOCK, (offset + size - 1) // _BLOCK
        content = b"".join(map(self._read_block, range(first, last + 1)))
        return content[offset - first * _BLOCK :][:size]

    def _read_block(self, number: int) -> bytes:
        with self._lock:
            if number not in self._blocks:
                start = number * _BLOCK
                block = self._fetch(start, min(start + _BLOCK, self.size))
                self._blocks = dict([*self._blocks.items(), (number, block)][-2:])
            return self._blocks[number]

    def _fetch(self, start: int, end: int) -> bytes:
        return _bytes_of(*read_ranges([(self, start, end)]))

    def request(self, start: int, end: int) -> Awaitable[bytes]:
        """Ask once for the bytes of a range, in the thread that fsspec reads in."""
        import asyncio

        if self._fs.async_impl:
            return self._fs._cat_file(self._path, start=start, end=end)
        if not hasattr(self._opened, "_fetch_range"):
            return asyncio.to_thread(self._fs.cat_file, self._path, start=start, end=end)
        # The Hub's: what it asks of a file before it is read is asked once.
        return asyncio.to_thread(self._opened._fetch_range, start, end)

    @functools.cached_property
    def _opened(self) -> Any:
        return self._fs.open(self._path, "rb", cache_type="none")

    def close(self) -> None:
        """There is nothing to close: each read is a request of its own."""

    def __enter__(self) -> "RemoteFile":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


OpenFile: TypeAlias = LocalFile | RemoteFile


def read_ranges(
    wanted: Sequence[tuple[RemoteFile, int, int]], patience: float | None = None
) -> list[bytes | Exception]:
    """The bytes of ranges of remote files, first byte and that behind the last, or why there are none; all at once."""
    import fsspec.asyn

    from .range_reads import PATIENCE, fetch_all  # with asyncio, which no `--help` needs

    fetches = [(functools.partial(file.request, start, end), end - start) for file, start, end in wanted]
    found = fsspec.asyn.sync(fsspec.asyn.get_loop(), fetch_all, fetches, patience or PATIENCE)
    return [
        _named(file.name, content) if isinstance(content, Exception) else content
        for (file, _, _), content in zip(wanted, found, strict=True)
    ]


def _bytes_of(content: bytes | Exception) -> bytes:
    if isinstance(content, Exception):
        raise content
    return content


def _named(url: str, error: Exception) -> Exception:
    try:
        with remote_errors_named(url, library_alone=True):
            raise error
    except Exception as named:
        return named


def open_file(path: "str | Place", whole: bool = False) -> OpenFile:
    """Open a file to be read at any byte; `whole` tells that it will be read from its beginning to its end."""
    return RemoteFile(str(path), whole) if is_remote(path) else LocalFile(path, "rb")


class _Stream(io.RawIOBase):
    """A remote file with a position, for libraries that ask for one."""

    def __init__(self, file: RemoteFile):
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        content = self._file.read_at(self._file.size if size is None or size < 0 else size, self._at)
        self._at += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def open_stream(path: "str | Place") -> io.RawIOBase:
    """Open a file of bytes with a position."""
    return _Stream(RemoteFile(str(path))) if is_remote(path) else LocalFile(path, "rb")


def arrow_source(path: "str | Place") -> "str | Place | pa.PythonFile":
    """What pyarrow is given to read a file: a path of this machine as it is."""
    if not is_remote(path):
        return path
    import pyarrow as pa

    return pa.PythonFile(open_stream(path), mode="r")


def identity(path: "str | Place") -> dict[str, Any]:
    """`size` in bytes of a file and its `mtime_ns`, or `etag` where it is remote; a `FileNotFoundError`."""
    if is_remote(path):
        _forget_listings(str(path))
        return _identity(str(path), _info(str(path)))
    stat = os.stat(path)
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def identities(paths: "Sequence[str | Place]") -> list[dict[str, Any] | None]:
    """[`identity`] of many files, None of one that is not there; of a folder of a bucket by its listing."""
    folders: dict[str, int] = defaultdict(int)
    for path in paths:
        folders[_folder(path)] += is_remote(path)
    listed: dict[str, dict[str, Any]] = {}
    for folder, count in folders.items():
        if count > 1:
            fs = filesystem(folder)
            _forget_listings(folder)
            with contextlib.suppress(FileNotFoundError), remote_errors_named(folder):
                listed |= {info["name"]: info for info in fs.ls(folder, detail=True)}
    found: list[dict[str, Any] | None] = []
    for path in paths:
        try:
            if folders[_folder(path)] > 1:
                name = filesystem(str(path))._strip_protocol(str(path))
                found.append(_identity(str(path), listed[name]) if name in listed else None)
            else:
                found.append(identity(path))
        except FileNotFoundError:
            found.append(None)
    return found


def _forget_listings(url: str) -> None:
    """The Hub's library keeps them whatever it is told; of a commit they hold for ever."""
    if not _COMMIT.search(url):
        filesystem(url).invalidate_cache()


def _folder(path: "str | Place") -> str:
    return str(path).rpartition("/")[0]


def _identity(url: str, info: dict[str, Any]) -> dict[str, Any]:
    content = (info.get("lfs") or {}).get("sha256")  # of the Hub: its own tag is another in each commit
    etag = content or next((info[name] for name in _ETAGS if info.get(name)), None)
    if etag is None:
        raise ValueError(f"{url}: nothing tells whether it has changed (no ETag or time): copy it first")
    etag = etag.timestamp() if isinstance(etag, datetime) else etag
    return {"size": int(info["size"]), "etag": str(etag).strip('"')}


def _info(url: str) -> dict[str, Any]:
    with remote_errors_named(url, library_alone=True):
        info = filesystem(url).info(url)
    if info["type"] != "file":
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", url)
    return info


def filesystem(url: str) -> "AbstractFileSystem":
    """The library of a URL, one for each process: what a fork inherits cannot be used."""
    import fsspec

    return fsspec.filesystem(_URL.match(url)[1], **_SETTINGS)


@contextlib.contextmanager
def remote_errors_named(url: "str | Place", library_alone: bool = False) -> Iterator[None]:
    """Make of what a library raises in the block an `OSError` with the URL; of a `ValueError` if it is alone there."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such file", error.filename or str(url)) from None
    except OSError as error:
        if error.filename is None and is_remote(url):
            kind = type(error) if isinstance(error, PermissionError | TimeoutError) else OSError
            raise kind(error.errno or errno.EIO, " ".join(str(error).split()), str(url)) from error
        raise
    except Exception as error:  # each library has its own kinds, without a common one
        if isinstance(error, ImportError | MemoryError) or isinstance(error, ValueError) and not library_alone:
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {' '.join(str(error).split())}", str(url)) from error
