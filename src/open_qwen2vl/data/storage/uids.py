"""Names of samples, 128 bits each, and the `.npy` files that list them in DataComp's form.

A uid is text of 32 hex digits in a sample's json, and a pair of unsigned 64-bit numbers, the upper half first, in an
array: 16 bytes a sample, sorted, so that files of any size are searched where they lie on the disk.
"""

import logging
import re
from collections.abc import Sequence

import numpy as np

from ...files import renamed_when_whole
from ...places import Place, place
from .open_files import check_mapped, map_array

logger = logging.getLogger(__name__)

UID_DTYPE = np.dtype("u8,u8")
_HEX_DIGITS = re.compile("[0-9a-fA-F]{32}")
_CHECKED_AT_ONCE = 1 << 20


def parse_uid(text: str) -> tuple[int, int]:
    """Upper and lower half of 32 hex digits; a `ValueError` for anything else."""
    if not isinstance(text, str) or not _HEX_DIGITS.fullmatch(text):
        raise ValueError(f"a uid has 32 hex digits, this has not: {text!r:.80}")
    return int(text[:16], 16), int(text[16:], 16)


def parse_uids(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower halves of many uids of 32 hex digits, which is not checked: uint64 `(n,)` each."""
    halves = np.frombuffer(bytes.fromhex("".join(texts)), ">u8").reshape(-1, 2).astype(np.uint64)
    return halves[:, 0], halves[:, 1]


def format_uid(high: int, low: int) -> str:
    """32 lower-case hex digits of two halves."""
    return f"{high:016x}{low:016x}"


def read_uids(path: str | Place) -> np.ndarray:
    """Open a file of uids, dtype `u8,u8` as DFN's and our own: `UID_DTYPE` `(uids,)`, sorted, each once.

    Memory-mapped, or a corrected copy of what is not sorted or has uids twice. A `ValueError` for another form.
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


def write_uids(path: str | Place, uids: np.ndarray) -> None:
    """Write a file of uids, sorted and each once: the same bytes as `np.save` of that array."""
    if not _is_increasing(uids):
        uids = _sorted_unique(uids)
    with renamed_when_whole(place(path)) as temporary, open(temporary, "wb") as file:
        np.save(file, uids, allow_pickle=False)


def find_uids(sorted_uids: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Index of each uid in the list of [`read_uids`], -1 where it is not there: int64 `(n,)`."""
    check_mapped(sorted_uids)
    points = _insertion_points(sorted_uids, high, low)
    inside = np.flatnonzero(points < len(sorted_uids))
    at = sorted_uids[points[inside]]
    equal = (at["f0"] == high[inside]) & (at["f1"] == low[inside])
    found = np.full(len(points), -1)
    found[inside[equal]] = points[inside[equal]]
    return found


def contains_uids(sorted_uids: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Which uids stand in the list of [`read_uids`]: bool `(n,)`."""
    return find_uids(sorted_uids, high, low) >= 0


def _insertion_points(sorted_uids: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
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
        check_mapped(uids)
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
