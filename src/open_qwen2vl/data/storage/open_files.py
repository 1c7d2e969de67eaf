"""Files that stay open while they are used, and are read at a location."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ...places import OpenFile, Place, is_remote
from ...transfers import local_copy

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


class Span(NamedTuple):
    """Bytes of an open file that were read at once."""

    start: int
    content: bytes

    def read(self, file: OpenFile, size: int, offset: int) -> bytes:
        """As `read_at` of the file, which reads what is not in here."""
        first = offset - self.start
        if 0 <= first and first + size <= len(self.content):
            return self.content[first : first + size]
        return file.read_at(size, offset)


NOTHING = Span(0, b"")


def map_array(path: str | Place, form: str = "one array") -> np.ndarray:
    """The array of a `.npy` file where it lies on the disk, of a remote one in a copy that goes with the array.

    A `ValueError` if it is not whole or not of this form.
    """
    if not is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: no regular file")
    try:
        with local_copy(path) as copy:
            array = np.load(copy, mmap_mode="r", allow_pickle=False)
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
    if name is not None and os.path.exists(name) and os.stat(name).st_size < array.offset + array.nbytes:
        raise OSError(f"{name} has been cut since it was opened")
