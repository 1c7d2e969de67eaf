"""Bin packing of document lengths: the core of the pack planner.

Lengths are small integers, so all work is done on their histogram: a *pattern* says how many items of each size
one pack holds and how often that pack is repeated, which keeps a million lengths at a few thousand patterns.
First-fit-decreasing is the start; passes of a randomised fill (fixed seed) then look for fewer packs. Each pack
gets the largest size left and a subset of randomly drawn sizes that fills it exactly, found with a Python integer
as bit set (minimum bin slack: Gupta and Ho, 1999). After a pass, sizes that ended in badly filled packs are drawn
more often (sequential value correction: Belov and Scheithauer, 2007). The result never has more packs than FFD.
Where the images of a pack are bounded as well and that bound cannot be ignored, bins_with_images.py does the work.
"""

import operator
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from .bins_with_images import Pattern, fewest_packs_with_images

_PASSES = 10  # twenty gave 0.2 % fewer packs at best
_CANDIDATES = 48  # sizes drawn to fill one pack; a pack of captions holds about 24 documents
_VALUE_STEP = 16.0  # how much more a size is worth in the next pass, per fraction of a pack wasted around it
_LONGEST_SEARCH = 1 << 22  # a bit set of more positions than this costs too much time and memory


class _Pattern(NamedTuple):
    content: dict[int, int]  # index of a size -> how many items of it
    times: int
    room: int  # space left in each of the packs


class _Stock:
    """The items not packed yet: `left[i]` of size `sizes[i]`. Sizes ascend; index 0, of size 0, means "nothing"."""

    def __init__(self, sizes: list[int], counts: list[int]):
        self.sizes = sizes
        self.left = list(counts)
        self.top = len(sizes) - 1  # index of the largest size with items left
        self._below = list(range(len(sizes)))

    def largest(self, i: int) -> int:
        """The largest size up to the `i`-th that has items left (union-find: nearly constant time)."""
        below = self._below
        while below[i] != i:
            below[i] = below[below[i]]
            i = below[i]
        return i

    def times(self, content: dict[int, int]) -> int:
        """How many packs with this content the items left allow."""
        return min(self.left[i] // number for i, number in content.items())

    def take(self, content: dict[int, int], times: int) -> None:
        for i, number in content.items():
            self.left[i] -= number * times
            if not self.left[i]:
                self._below[i] = i - 1
        self.top = self.largest(self.top)

    def fill_largest_first(self, content: dict[int, int], room: int) -> int:
        """Adds the largest item that fits to `content`, again and again; returns the space that is left."""
        i = self.top + 1
        while i := self.largest(min(i, bisect_right(self.sizes, room)) - 1):
            number = min(self.left[i] - content.get(i, 0), room // self.sizes[i])
            if number:
                content[i] = content.get(i, 0) + number
                room -= number * self.sizes[i]
        return room


def pack_lengths(
    lengths: Sequence[int] | np.ndarray,
    max_length: int,
    images: Sequence[int] | np.ndarray | None = None,
    max_images: int | None = None,
) -> np.ndarray:
    """
    Distributes documents over as few packs as it can find, none above `max_length` tokens or `max_images` images.

    The result depends on the arguments alone; without `max_images` it never has more packs than first-fit-decreasing.
    A million documents take about two seconds at `max_length=4096`: sorts, greedy packing, a search of bounded work.

    Args:
        lengths (`Sequence[int]` or `np.ndarray` of shape `(n,)`):
            Length of each document in tokens, of any integer dtype.
        max_length (`int`):
            Capacity of a pack in tokens.
        images (`Sequence[int]` or `np.ndarray` of shape `(n,)`, *optional*):
            Number of images of each document; looked at only with `max_images`.
        max_images (`int`, *optional*):
            Most images of a pack; any number where not given.

    Returns:
        `np.ndarray` of shape `(n,)`, int64: the pack number of each document; the numbers start at 0 without a gap.

    Raises:
        `ValueError`: if `lengths` is not a flat list of integers, or a length (named by its index) is below 1 or
            above `max_length`, or `max_length` is not a positive integer; `images` (from 0) and `max_images` likewise.
    """
    lengths, max_length = _checked(lengths, max_length)
    if max_images is not None:
        return _pack_with_images(lengths, max_length, images, max_images)
    if not lengths.size:
        return np.empty(0, dtype=np.int64)
    values, counts = np.unique(lengths, return_counts=True)
    patterns = _fewest_packs([0, *values.tolist()], [0, *counts.tolist()], max_length)
    return _number_packs(lengths, patterns)


def _pack_with_images(
    lengths: np.ndarray, max_length: int, images: Sequence[int] | None, max_images: int
) -> np.ndarray:
    images, max_images = _checked([] if images is None else images, max_images, ("images", "max_images"), 0)
    if images.size != lengths.size:
        raise ValueError(f"max_images needs the images of {lengths.size} documents, got {images.size}")
    # Where tokens bind anyway, packs found by tokens alone mostly hold few enough images: better and much faster.
    if lower_bound(images[images > 0], max_images) <= lower_bound(lengths, max_length):
        packs = pack_lengths(lengths, max_length)
        if not packs.size or np.bincount(packs, weights=images).max() <= max_images:
            return packs
    # A kind is one number whose order is by images, then by tokens.
    kinds, kind, counts = np.unique(images * (max_length + 1) + lengths, return_inverse=True, return_counts=True)
    of_images, of_tokens = (sizes.tolist() for sizes in np.divmod(kinds, max_length + 1))
    return _number_packs(kind, fewest_packs_with_images(of_tokens, of_images, counts.tolist(), max_length, max_images))


def lower_bound(lengths: Sequence[int] | np.ndarray, max_length: int) -> int:
    """Number of packs that no packing of `lengths` can beat: the bound L2 of Martello and Toth (1990).

    It is `ceil(sum / max_length)`, or more where long documents share their packs with none of at least t tokens:
    these and whatever the packs of the others above half cannot take need packs of their own, for the worst t.
    """
    lengths, max_length = _checked(lengths, max_length)
    return _lower_bound(*np.unique(lengths, return_counts=True), max_length)


def _checked(
    sizes: Sequence[int] | np.ndarray,
    capacity: int,
    names: tuple[str, str] = ("lengths", "max_length"),
    least: int = 1,
) -> tuple[np.ndarray, int]:
    name, capacity_name = names
    if isinstance(capacity, (bool, np.bool_)) or not hasattr(capacity, "__index__") or capacity < 1:
        raise ValueError(f"{capacity_name} must be a positive integer, got {capacity!r}")
    array = np.asarray(sizes)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a flat list of integers, got shape {array.shape} of dtype {array.dtype}")
    wrong = np.flatnonzero((array < least) | (array > capacity))
    if wrong.size:
        index = int(wrong[0])
        raise ValueError(f"{name}[{index}] is {array[index]}, must be between {least} and {capacity_name}={capacity}")
    return array.astype(np.int64, copy=False), operator.index(capacity)


def _lower_bound(values: np.ndarray, counts: np.ndarray, max_length: int) -> int:
    items = np.concatenate([[0], np.cumsum(counts)])
    tokens = np.concatenate([[0], np.cumsum(values * counts)])
    half = np.searchsorted(values, max_length // 2, side="right")
    # A threshold t at each value up to half, and one above, at which only the items above half count.
    threshold = np.append(values[:half], max_length // 2 + 1)
    alone = np.searchsorted(values, max_length - threshold, side="right").clip(min=half)
    free = (items[alone] - items[half]) * max_length - (tokens[alone] - tokens[half])
    small = tokens[half] - tokens[: half + 1]
    more = -((free - small) // max_length)
    return int((items[-1] - items[half] + more.clip(min=0)).max())


def _fewest_packs(sizes: list[int], counts: list[int], max_length: int) -> list[_Pattern]:
    """The best of first-fit-decreasing and the randomised passes, which end at the lower bound."""
    best = _first_fit_decreasing(_Stock(sizes, counts), max_length)
    if max_length > _LONGEST_SEARCH:
        return best
    bound = _lower_bound(np.array(sizes[1:]), np.array(counts[1:]), max_length)
    uniform = random.Random(0).random
    # Patterns that all passes together may make: one to two seconds, but counted, so that results are repeatable.
    effort = (3 << 30) // (max_length + (1 << 17))
    value = [float(size * size) for size in sizes]  # how eagerly a size is drawn: long documents are hard to place
    for _ in range(_PASSES):
        if _number_of_packs(best) <= bound:
            break
        patterns = _one_pass(_Stock(sizes, counts), value, max_length, effort, uniform)
        if patterns is None:
            break
        effort -= len(patterns)
        best = min(best, patterns, key=_number_of_packs)
        value = _corrected(value, counts, patterns, max_length)
    return best


def _number_of_packs(patterns: list[_Pattern]) -> int:
    return sum(pattern.times for pattern in patterns)


def _first_fit_decreasing(stock: _Stock, max_length: int) -> list[_Pattern]:
    """Pack by pack "the largest item that fits": the very packs that first-fit-decreasing makes."""
    patterns = []
    while stock.top:
        content: dict[int, int] = {}
        room = stock.fill_largest_first(content, max_length)
        times = stock.times(content)  # the same pack comes again as long as the items last
        stock.take(content, times)
        patterns.append(_Pattern(content, times, room))
    return patterns


def _one_pass(
    stock: _Stock, value: list[float], max_length: int, effort: int, uniform: Callable[[], float]
) -> list[_Pattern] | None:
    """Packs everything, each pack around the largest item left; `None` if that takes more than `effort` patterns."""
    weight = list(accumulate(count * x for count, x in zip(stock.left, value, strict=True)))

    def draw(room: int) -> int:
        # Weights are those of the beginning: a size that has run out falls to the next smaller one.
        last = min(bisect_right(stock.sizes, room) - 1, stock.top)
        return stock.largest(bisect_right(weight, uniform() * weight[last], 0, last)) or stock.largest(last)

    patterns = []
    while stock.top:
        if len(patterns) == effort:
            return None
        content = {stock.top: 1}
        room = _fill_exactly(stock, content, max_length - stock.sizes[stock.top], draw)
        room = stock.fill_largest_first(content, room)
        times = stock.times(content)
        stock.take(content, times)
        patterns.append(_Pattern(content, times, room))
    return patterns


def _fill_exactly(stock: _Stock, content: dict[int, int], room: int, draw: Callable[[int], int]) -> int:
    """Adds to `content` the subset of some drawn items that leaves the least space; returns that space."""
    sizes = stock.sizes
    drawn = dict(content)
    steps: list[tuple[int, int]] = []  # each item drawn, with `reach` before it
    reach = 0  # bit r is set: some subset of the items drawn leaves the space r
    draws = _CANDIDATES
    while draws and (i := draw(room)):
        available = stock.left[i] - drawn.get(i, 0)
        bulk = 0 if steps else min(available, room // (32 * sizes[i]))
        if bulk:  # the candidates would fill only a part of so much space: take a share of it at once
            drawn[i] = content[i] = content.get(i, 0) + bulk
            room -= bulk * sizes[i]
            continue
        draws -= 1
        if available:
            reach = reach or 1 << room
            steps.append((i, reach))
            drawn[i] = drawn.get(i, 0) + 1
            # All subsets with this item at once: each space that was reached, less its size.
            reach |= reach >> sizes[i]
            if reach & 1:  # full to the last token
                break
    if not steps:
        return room
    left = space = (reach & -reach).bit_length() - 1  # the lowest bit: the least space
    for i, before in reversed(steps):
        if not before >> space & 1:  # not reached without this item
            content[i] = content.get(i, 0) + 1
            space += sizes[i]
    return left


def _corrected(value: list[float], counts: list[int], patterns: list[_Pattern], max_length: int) -> list[float]:
    """Raises the value of each size by the mean fraction of a pack that was wasted around its items."""
    wasted = [0] * len(value)
    for content, times, room in patterns:
        for i, number in content.items():
            wasted[i] += number * times * room
    return [
        x * (1 + _VALUE_STEP * waste / (max(count, 1) * max_length))
        for x, waste, count in zip(value, wasted, counts, strict=True)
    ]


def _number_packs(lengths: np.ndarray, patterns: Sequence[_Pattern | Pattern]) -> np.ndarray:
    """Deals the items of each size, in their order, to the packs of the patterns, in theirs."""
    rows = [(i, number, pattern.times) for pattern in patterns for i, number in pattern.content.items()]
    size, number, times = np.array(rows, dtype=np.int64).T
    first = np.cumsum([0] + [pattern.times for pattern in patterns[:-1]])
    first = np.repeat(first, [len(pattern.content) for pattern in patterns])
    items = number * times
    row = np.repeat(np.arange(len(rows)), items)
    in_row = np.arange(lengths.size) - np.repeat(np.cumsum(items) - items, items)
    pack = first[row] + in_row // number[row]
    packs = np.empty(lengths.size, dtype=np.int64)
    # Both in the order of sizes, so that the n-th document of a size gets the n-th place for it.
    packs[np.argsort(lengths, kind="stable")] = pack[np.argsort(size[row], kind="stable")]
    return packs
