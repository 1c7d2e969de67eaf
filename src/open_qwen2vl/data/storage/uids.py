"""Names of samples, 128 bits each, and the `.npy` files that list them in DataComp's form.

A uid is text of 32 hex digits in a sample's json, and a pair of unsigned 64-bit numbers, the upper half first, in an
array: 16 bytes a sample, sorted, so that files of any size are searched where they lie on the disk.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...files import renamed_when_whole
from .open_files import map_array

logger = logging.getLogger(__name__)

UID_DTYPE = np.dtype("u8,u8")
_HEX_DIGITS = re.compile("[0-9a-fA-F]{32}")
_CHECKED_AT_ONCE = 1 << 20


def parse_uid(text: str) -> tuple[int, int]:
    """The numbers of a uid.

    Args:
        text (`str`): 32 hex digits, upper or lower case.

    Returns:
        `tuple[int, int]`: upper and lower half.

    Raises:
        ValueError: if it is anything else.
    """
    if not isinstance(text, str) or not _HEX_DIGITS.fullmatch(text):
        raise ValueError(f"a uid has 32 hex digits, this has not: {text!r:.80}")
    return int(text[:16], 16), int(text[16:], 16)


def parse_uids(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of many uids.

    Args:
        texts (`Sequence[str]`): of 32 hex digits each, which is not checked.

    Returns:
        `tuple[np.ndarray, np.ndarray]` of shape `(n,)` and dtype uint64: upper and lower halves.
    """
    halves = np.frombuffer(bytes.fromhex("".join(texts)), ">u8").reshape(-1, 2).astype(np.uint64)
    return halves[:, 0], halves[:, 1]


def format_uid(high: int, low: int) -> str:
    """The text of a uid.

    Args:
        high (`int`): upper half.
        low (`int`): lower half.

    Returns:
        `str`: 32 lower-case hex digits.
    """
    return f"{high:016x}{low:016x}"


def read_uids(path: str | Path) -> np.ndarray:
    """Open a file of uids.

    Args:
        path (`str | Path`): an `.npy` file of dtype `u8,u8`, as DFN's and our own.

    Returns:
        `np.ndarray` of shape `(uids,)` and dtype `UID_DTYPE`: sorted, each once; memory-mapped, unless the file is
        not sorted or has uids twice: then a corrected copy.

    Raises:
        ValueError: for a file of another form.
        OSError: if it cannot be read.
    """
    uids = map_array(path, "an array of dtype u8,u8")
    if uids.dtype != UID_DTYPE or uids.ndim != 1:
        found = f"{uids.dtype} of shape {uids.shape}"
        raise ValueError(f"{path}: uids are one array of dtype u8,u8 and shape (N,), this has {found}")
    if _is_increasing(uids):
        return uids
    corrected = _sorted_unique(uids)
    logger.warning("%s: not sorted, or with uids twice: %d of %d uids stay", path, len(corrected), len(uids))
    return corrected


def write_uids(path: str | Path, uids: np.ndarray) -> None:
    """Write a file of uids, the same bytes as `np.save` of the sorted array.

    Args:
        path (`str | Path`): its name; the file appears when it is whole.
        uids (`np.ndarray` of shape `(uids,)` and dtype `UID_DTYPE`): in any order; those that come twice are written
            once.
    """
    if not _is_increasing(uids):
        uids = _sorted_unique(uids)
    with renamed_when_whole(Path(path)) as temporary, open(temporary, "wb") as file:
        np.save(file, uids, allow_pickle=False)


def find_uids(sorted_uids: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Where uids stand in a list.

    Args:
        sorted_uids (`np.ndarray` of shape `(uids,)` and dtype `UID_DTYPE`): the list, as [`read_uids`] returns it.
        high (`np.ndarray` of shape `(n,)`, uint64): upper halves of the uids in question.
        low (`np.ndarray` of shape `(n,)`, uint64): their lower halves.

    Returns:
        `np.ndarray` of shape `(n,)`, int64: the index of each, -1 for one that is not in the list.
    """
    places = _places(sorted_uids, high, low)
    inside = np.flatnonzero(places < len(sorted_uids))
    at = sorted_uids[places[inside]]
    equal = (at["f0"] == high[inside]) & (at["f1"] == low[inside])
    found = np.full(len(places), -1)
    found[inside[equal]] = places[inside[equal]]
    return found


def contains_uids(sorted_uids: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Which uids stand in a list.

    Args:
        sorted_uids (`np.ndarray` of shape `(uids,)` and dtype `UID_DTYPE`): the list, as [`read_uids`] returns it.
        high (`np.ndarray` of shape `(n,)`, uint64): upper halves of the uids in question.
        low (`np.ndarray` of shape `(n,)`, uint64): their lower halves.

    Returns:
        `np.ndarray` of shape `(n,)`, bool.
    """
    return find_uids(sorted_uids, high, low) >= 0


def _places(sorted_uids: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """For each uid the number of listed ones below it."""
    first = np.searchsorted(sorted_uids["f0"], high, "left")
    last = np.searchsorted(sorted_uids["f0"], high, "right")
    # Uids of one upper half, rarely more than one, are told apart by a binary search of the lower halves.
    while len(open_ones := np.flatnonzero(first < last)):
        middle = (first[open_ones] + last[open_ones]) // 2
        below = sorted_uids["f1"][middle] < low[open_ones]
        first[open_ones[below]] = middle[below] + 1
        last[open_ones[~below]] = middle[~below]
    return first


def _is_increasing(uids: np.ndarray) -> bool:
    """Whether they are sorted without a repetition, looked at by pieces: the file may be larger than the memory."""
    for start in range(0, len(uids) - 1, _CHECKED_AT_ONCE):
        piece = uids[start : start + _CHECKED_AT_ONCE + 1]
        high, low = np.ascontiguousarray(piece["f0"]), np.ascontiguousarray(piece["f1"])
        if not np.all((high[:-1] < high[1:]) | ((high[:-1] == high[1:]) & (low[:-1] < low[1:]))):
            return False
    return True


def _sorted_unique(uids: np.ndarray) -> np.ndarray:
    ordered = uids[np.lexsort((uids["f1"], uids["f0"]))]
    fresh = np.ones(len(ordered), bool)
    fresh[1:] = (ordered["f0"][1:] != ordered["f0"][:-1]) | (ordered["f1"][1:] != ordered["f1"][:-1])
    return ordered[fresh]
