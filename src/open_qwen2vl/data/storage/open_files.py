"""Files that stay open while they are used, and are read at a location."""

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

OPEN_FILES = 64  # of each kind that one process keeps open


class Newest:
    """The files that were used last; older ones are closed."""

    def __init__(self, open_file: Callable[[int], Any]):
        self._open_file = open_file
        self._files: dict[int, Any] = {}

    def __getitem__(self, number: int) -> Any:
        file = self._files.pop(number, None) or self._open_file(number)
        self._files[number] = file  # dicts keep the order of insertion
        if len(self._files) > OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        return file


def read_at(file: int, size: int, offset: int) -> bytes:
    """Bytes of an open file from a location, fewer at its end; an error names the file."""
    try:
        return os.pread(file, size, offset)
    except OSError as error:
        with contextlib.suppress(OSError):
            error.filename = os.readlink(f"/proc/self/fd/{file}")
        raise


class Span(NamedTuple):
    """Bytes of an open file that were read at once."""

    start: int
    content: bytes

    def read(self, file: int, size: int, offset: int) -> bytes:
        """As [`read_at`], which reads what is not in here."""
        first = offset - self.start
        if 0 <= first and first + size <= len(self.content):
            return self.content[first : first + size]
        return read_at(file, size, offset)


NOTHING = Span(0, b"")


def map_array(path: str | os.PathLike, form: str = "one array") -> np.ndarray:
    """The array of a `.npy` file where it lies on the disk; a `ValueError` if it is not whole or not of this form."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: no regular file")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy's reader of headers raises many kinds: SyntaxError, TokenError, BadZipFile, ...
        raise ValueError(f"{path}: not a whole .npy file of {form}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: several arrays, not {form}")
    return array


def check_mapped(array: np.ndarray) -> None:
    """Raise OSError for a mapped file that was cut since: to touch what is gone would end the process (SIGBUS)."""
    name = getattr(array, "filename", None)
    if name is not None and os.stat(name).st_size < array.offset + array.nbytes:
        raise OSError(f"{name} has been cut since it was opened")
