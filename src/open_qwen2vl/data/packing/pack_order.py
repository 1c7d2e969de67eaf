"""The order in which a run reads the packs of a mixture: a pure function of mixture, seed, epoch and global batch.
Where sources have schedules or limits on epochs it depends on the length of the run, too.

    source ─ endless stream of seeded permutations ─► its picks of this epoch ─┐
    source ─ ...                                                               ├─ interleaved evenly ─► optimizer steps
    source ─ ...                                                               ┘
    optimizer step ─ sorted by patches ─► micro-batches ─► ranks

Nothing of it is state: a resumed run asks for the same epoch and skips. The packs of a step do not depend on how the
global batch is split into devices, packs per device and accumulation.
"""

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from .mixture import PackMixture
from .weights import picks_per_epoch, turns_of_run


class PackOrder(Sampler[int]):
    """Indices into a mixture, for a loader whose batches accelerate deals to the ranks round-robin.

    A source is read `epochs` times in an epoch; with weights, the source that is largest for its weight is read once
    and the others as often as their weights ask. What one epoch leaves out of a permutation, the next begins with, so
    that no pack is read again before all others of its source were. The shares hold from the first step to the last.
    Sources that no batch can hold together, as with more tokens per image of Open-Qwen2VL, are read one after another
    ([`source_phases`]); Qwen2-VL's budgets of pixels are mixed unless the sources have phases. Each phase is filled up
    with empty packs to a whole optimizer step.

    A schedule of weights, or a limit on the epochs of a source, is about the run: the turns of its sources are laid
    out from its first pack to its last, and an epoch, as long as the mean weights make it, is a part of them.

    Args:
        mixture ([`PackMixture`]): the packs.
        world_size (`int`): data-parallel ranks.
        batch_size (`int`): packs per rank and micro-batch.
        accumulation (`int`): micro-batches of an optimizer step.
        seed (`int`): of the permutations, not negative.
        shuffle (`bool`, *optional*, defaults to `True`): `False`, for evaluation, reads the sources as planned.
        window (`int`, *optional*): parts of a plan whose packs are mixed with each other, and read before those of
            the next so many; None mixes all of them.
        run (`tuple[float, int]`, *optional*, defaults to one epoch): epochs of the run, and its optimizer steps, which
            count instead if above 0.

    Raises:
        ValueError: if one of the three counts is below 1, or for schedules or limits that this run cannot follow.
    """

    def __init__(
        self,
        mixture: PackMixture,
        world_size: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        shuffle: bool = True,
        run: tuple[float, int] = (1.0, -1),
        window: int | None = None,
    ):
        for name, value in (("world_size", world_size), ("batch_size", batch_size), ("accumulation", accumulation)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.world_size, self.batch_size, self.global_batch = (
            world_size,
            batch_size,
            world_size * batch_size * accumulation,
        )
        self.seed, self.shuffle, self.epoch, self._window = seed, shuffle, 0, window
        self._sizes = [len(dataset) for dataset in mixture.datasets]
        plans, (epochs, steps) = [dataset.plan for dataset in mixture.datasets], run
        self._counts = picks_per_epoch(mixture.sources, self._sizes, plans, 1.0 if steps > 0 else epochs)
        self._phases = mixture.phases
        self._longest = math.inf  # packs of an epoch
        self._turns: np.ndarray | None = None  # source of each pack of the run, where that is not the same in all
        if any(source.follows_run for source in mixture.sources):
            if len(self._phases) > 1:
                raise ValueError(
                    "max_epochs and schedules of weights need sources that share batches, and these have other tokens "
                    "per image"
                )
            steps = steps if steps > 0 else math.ceil(epochs * len(self) / self.global_batch)
            self._turns = turns_of_run(mixture.sources, self._sizes, plans, steps * self.global_batch)
            # A weight near 0 makes an epoch of all packs of the largest source very long.
            self._longest = len(self._turns)
        self._mixture = mixture
        self._labels_of_epoch = -1, np.zeros(0, np.int64)
        self._patches = mixture.patches_per_pack

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through.

        Args:
            epoch (`int`): from 0.
        """
        self.epoch = epoch

    @property
    def counts_of_run(self) -> list[int] | None:
        """Packs of each source that the run reads, where schedules or limits say so."""
        return None if self._turns is None else np.bincount(self._turns, minlength=len(self._sizes)).tolist()

    @property
    def _packs_of_window(self) -> int:
        """Packs of a window, of all sources, about."""
        parts = sum(len(dataset.part_ends) for dataset in self._mixture.datasets)
        return max(self.global_batch, self._window * sum(self._sizes) // parts)

    def __len__(self) -> int:
        packs = (sum(self._counts[source] for source in phase) for phase in self._phases)
        return min(self._longest, sum(-(-number // self.global_batch) * self.global_batch for number in packs))

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        for packs in self._epoch_orders(epoch):
            for start in range(0, len(packs), self.global_batch):
                if self._window is not None:
                    self._fetch_ahead(packs, start)
                yield from self._deal(packs[start : start + self.global_batch]).tolist()

    def labels_of_step(self, step: int) -> int:
        """Labels that a step of the run is planned to have, on all ranks; steps count from 0 over all epochs."""
        epoch, step = divmod(step, len(self) // self.global_batch)
        if self._labels_of_epoch[0] != epoch:
            packs = np.concatenate(list(self._epoch_orders(epoch)))
            labels = _figures_of(packs, self._mixture.labels_per_pack)
            self._labels_of_epoch = epoch, labels.reshape(-1, self.global_batch).sum(1)
        return int(self._labels_of_epoch[1][step])

    def _epoch_orders(self, epoch: int) -> Iterator[np.ndarray]:
        """Indices of an epoch's packs, phase by phase, each filled up to whole optimizer steps."""
        if self._turns is None:
            yield from (self._phase_order(phase, epoch) for phase in self._phases)
            return
        start, stop = epoch * len(self), (epoch + 1) * len(self)
        before = np.bincount(self._turns[:start], minlength=len(self._sizes))
        turns = self._turns[start:stop]
        # Behind the end of the run, where nobody reads, empty packs.
        order = np.full(len(self), sum(self._sizes))
        for source, first in enumerate(before.tolist()):
            own = turns == source
            order[: len(turns)][own] = sum(self._sizes[:source]) + self._stream(source, first, first + int(own.sum()))
        yield order

    def _phase_order(self, phase: list[int], epoch: int) -> np.ndarray:
        """Indices of a phase's packs, filled up to whole optimizer steps."""
        counts = [self._counts[source] for source in phase]
        turns = _interleave(counts) if self.shuffle else np.repeat(np.arange(len(phase), dtype=np.int32), counts)
        missing = -len(turns) % self.global_batch
        order = np.full(len(turns) + missing, sum(self._sizes) + phase[0])
        for turn, source in enumerate(phase):
            first, count = sum(self._sizes[:source]), self._counts[source]
            order[: len(turns)][turns == turn] = first + self._stream(source, epoch * count, (epoch + 1) * count)
        return order

    def _stream(self, source: int, start: int, stop: int) -> np.ndarray:
        """Packs of a source: a part of its endless stream of permutations."""
        size = self._sizes[source]
        if start == stop:
            return np.zeros(0, np.int64)
        numbers = range(start // size, -(-stop // size))
        stream = np.concatenate([self._permutation(source, number) for number in numbers])
        return stream[start - numbers[0] * size :][: stop - start]

    def _permutation(self, source: int, number: int) -> np.ndarray:
        size = self._sizes[source]
        if not self.shuffle:
            return np.arange(size)
        # Raw words of a bit generator are the same in every version of numpy, which `Generator` does not promise.
        generator = np.random.PCG64(np.random.SeedSequence([self.seed, source, number]))
        if self._window is None:
            return np.argsort(generator.random_raw(size), kind="stable")
        ends = self._mixture.datasets[source].part_ends
        window_of_part = np.argsort(np.argsort(generator.random_raw(len(ends)), kind="stable")) // self._window
        windows = np.repeat(window_of_part, np.diff(ends, prepend=0))
        return np.lexsort((generator.random_raw(size), windows))

    def _fetch_ahead(self, packs: np.ndarray, start: int) -> None:
        """Tell the mixture of the packs of the next window, a step's worth at a time, at the start of all of them."""
        ahead = self._packs_of_window
        first = start + ahead - self.global_batch if start else 0
        self._mixture.fetch_ahead(packs[first : start + ahead])

    def _deal(self, packs: np.ndarray) -> np.ndarray:
        """The packs of an optimizer step, most patches first, so that a micro-batch weighs the same on every rank."""
        if not self.shuffle:
            return packs
        packs = packs[np.argsort(-_figures_of(packs, self._patches), kind="stable")]
        # (micro-batch, index in the batch, rank); every other index runs back through the ranks.
        dealt = packs.reshape(-1, self.batch_size, self.world_size)
        dealt[:, 1::2] = dealt[:, 1::2, ::-1].copy()
        return dealt.swapaxes(1, 2).ravel()


def _figures_of(packs: np.ndarray, figures: np.ndarray) -> np.ndarray:
    """Figures of some packs; 0 of the empty ones, which are behind the last."""
    return np.where(packs < len(figures), figures[np.minimum(packs, len(figures) - 1)], 0)


def _interleave(counts: list[int]) -> np.ndarray:
    """Whose turn it is: turn `j` of `n` comes at the time `(j + 1/2) / n`, so that shares hold in every prefix."""
    times = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    turns = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return turns[np.argsort(times, kind="stable")]
