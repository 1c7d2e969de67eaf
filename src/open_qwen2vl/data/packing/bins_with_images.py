"""Bin packing with two capacities, tokens and images: what `pack_lengths` does where images bind.

As in `bins.py`, documents of the same kind (tokens, images) are counted, and a pattern is a pack's content with the
number of packs that have it. A pack starts with the costliest kind left; then, of some kinds drawn at random, comes
the subset that wastes least. A state (space, images left) is one bit of a Python integer, at `space * (max_images + 1)
+ images left`. What a token and an image cost follows from how many packs all tokens, and all images, would fill.
"""

import random
from bisect import bisect_right
from itertools import accumulate, groupby
from typing import NamedTuple

_CANDIDATES = 48  # kinds drawn to fill one pack
_EFFORT = 3 << 30  # bounds the work of the search, in bits of the states
_MOST_STATES = 1 << 22  # more cost too much time and memory: no search


class Pattern(NamedTuple):
    """Packs of equal content."""

    content: dict[int, int]  # index of a kind -> how many documents of it
    times: int  # how many packs


def fewest_packs_with_images(
    tokens: list[int], images: list[int], counts: list[int], max_length: int, max_images: int
) -> list[Pattern]:
    """The better of a randomised pass (fixed seed) and of filling with the costliest kind that fits.

    The lists are of kinds of documents, which ascend by images, then by tokens; each document is packed once.
    """
    states = (max_length + 1) * (max_images + 1)
    searches = (0, _EFFORT // (4 * states + (1 << 17))) if states <= _MOST_STATES else (0,)
    passes = (_Packer(tokens, images, counts, max_length, max_images).run(number) for number in searches)
    return min(passes, key=lambda patterns: sum(pattern.times for pattern in patterns))


class _Packer:
    """One pass over all documents. Index 0 of the lists means "nothing"."""

    def __init__(self, tokens: list[int], images: list[int], counts: list[int], max_length: int, max_images: int):
        self.tokens, self.images, self.left = [0, *tokens], [0, *images], [0, *counts]
        self.max_length, self.max_images = max_length, max_images
        self._below = list(range(len(self.left)))
        # (images, first kind, end): the kinds of as many images, tokens ascending
        places = [(number, [i for i, _ in kinds]) for number, kinds in groupby(enumerate(images, 1), lambda x: x[1])]
        self._classes = [(number, kinds[0], kinds[-1] + 1) for number, kinds in places]
        packs_of_tokens, packs_of_images = (
            sum(size * count for size, count in zip(sizes, self.left, strict=True)) / capacity
            for sizes, capacity in ((self.tokens, max_length), (self.images, max_images))
        )
        # The capacity that fills more packs binds: what of it is wasted costs most.
        most = max(packs_of_tokens, packs_of_images)
        self._token_cost, self._image_cost = packs_of_tokens / most / max_length, packs_of_images / most / max_images
        self._cost = [self._waste(*kind) for kind in zip(self.tokens, self.images, strict=True)]
        self._weight = list(accumulate(n * cost**2 for n, cost in zip(self.left, self._cost, strict=True)))
        self._uniform = random.Random(0).random
        self._width = max_images + 1

    def run(self, searches: int) -> list[Pattern]:
        """Pack everything; the first `searches` patterns are searched, the others filled costliest first."""
        patterns = []
        if searches:  # one bit at each space: the states without images left; shifted, those with that many
            self._every = ((1 << self._width * (self.max_length + 1)) - 1) // ((1 << self._width) - 1)
        for first in sorted(range(1, len(self.left)), key=self._cost.__getitem__, reverse=True):
            while self.left[first]:
                content = {first: 1}
                room, quota = self.max_length - self.tokens[first], self.max_images - self.images[first]
                if len(patterns) < searches:
                    room, quota = self._fill_best(content, room, quota)
                self._fill_costliest_first(content, room, quota)
                times = min(self.left[i] // number for i, number in content.items())
                self._take(content, times)
                patterns.append(Pattern(content, times))
        return patterns

    def _waste(self, room: int, quota: int) -> float:
        return self._token_cost * room + self._image_cost * quota

    def _largest(self, i: int) -> int:
        """The highest kind up to the `i`-th that has documents left (union-find)."""
        below = self._below
        while below[i] != i:
            below[i] = below[below[i]]
            i = below[i]
        return i

    def _take(self, content: dict[int, int], times: int) -> None:
        for i, number in content.items():
            self.left[i] -= number * times
            if not self.left[i]:
                self._below[i] = i - 1

    def _fill_costliest_first(self, content: dict[int, int], room: int, quota: int) -> None:
        """Adds the costliest document that fits to `content`, again and again."""
        while best := max(self._largest_that_fit(content, room, quota), key=self._cost.__getitem__, default=0):
            content[best] = content.get(best, 0) + 1
            room, quota = room - self.tokens[best], quota - self.images[best]

    def _largest_that_fit(self, content: dict[int, int], room: int, quota: int) -> list[int]:
        """Of each number of images the kind of the most tokens."""
        found = []
        for number, first, end in self._classes:
            if number > quota:
                break
            i = self._largest(bisect_right(self.tokens, room, first, end) - 1)
            # `left` is counted down when a pack is done: what this pack holds already is not there any more.
            while i >= first and self.left[i] <= content.get(i, 0):
                i = self._largest(i - 1)
            if i >= first:
                found.append(i)
        return found

    def _fill_best(self, content: dict[int, int], room: int, quota: int) -> tuple[int, int]:
        """Adds to `content` the subset of some drawn documents that wastes least; returns the space it leaves."""
        width, images, drawn = self._width, self.images, dict(content)
        reach = 1 << (room * width + quota)
        steps: list[tuple[int, int]] = []  # each document drawn, with `reach` before it
        for _ in range(_CANDIDATES):
            i = self._largest(bisect_right(self._weight, self._uniform() * self._weight[-1], 0, len(self._weight) - 1))
            if not i or self.tokens[i] > room or images[i] > quota or self.left[i] <= drawn.get(i, 0):
                continue
            drawn[i] = drawn.get(i, 0) + 1
            steps.append((i, reach))
            # Only states with enough images left: the shift would borrow the others' images from their tokens.
            enough = self._every * ((1 << width) - (1 << images[i])) if images[i] else reach
            reach |= (reach & enough) >> self._shift(i)
        # Back through the draws: a state that was not reached before one of them needs that document.
        state = best = self._least_waste(reach, quota)
        for i, before in reversed(steps):
            if not before >> state & 1:  # not reached without this document
                content[i] = content.get(i, 0) + 1
                state += self._shift(i)
        return divmod(best, width)

    def _shift(self, i: int) -> int:
        return self.tokens[i] * self._width + self.images[i]

    def _least_waste(self, reach: int, quota: int) -> int:
        """The state of least waste: for each number of images left, the one of the least space."""
        best = _lowest_bit(reach)
        waste = self._waste(*divmod(best, self._width))
        for left in range(quota + 1):
            if self._image_cost * left >= waste:
                break
            states = reach & (self._every << left)
            if states and self._waste(*divmod(_lowest_bit(states), self._width)) < waste:
                best = _lowest_bit(states)
                waste = self._waste(*divmod(best, self._width))
        return best


def _lowest_bit(number: int) -> int:
    return (number & -number).bit_length() - 1
