"""The order in which a run reads the packs of a mixture: a pure function of mixture, seed, epoch and global batch.

    source ─ endless stream of seeded permutations ─► its picks of this epoch ─┐
    source ─ ...                                                               ├─ interleaved evenly ─► optimizer steps
    source ─ ...                                                               ┘
    optimizer step ─ sorted by patches ─► micro-batches ─► ranks

Nothing of it is state: a resumed run asks for the same epoch and skips. The packs of a step do not depend on how the
global batch is split into devices, packs per device and accumulation.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from .mixture import PackMixture
from .weights import picks_per_epoch


class PackOrder(Sampler[int]):
    """Indices into a mixture, for a loader whose batches accelerate deals to the ranks round-robin.

    A source is read `epochs` times in an epoch; with weights, the source that is largest for its weight is read once
    and the others as often as their weights ask. What one epoch leaves out of a permutation, the next begins with, so
    that no pack is read again before all others of its source were. The shares hold from the first step to the last.
    Sources that no batch can hold together, as with more tokens per image of Open-Qwen2VL, are read one after another
    ([`source_phases`]); Qwen2-VL's budgets of pixels are mixed unless the sources have phases. Each phase is filled up
    with empty packs to a whole optimizer step.

    Args:
        mixture ([`PackMixture`]): the packs.
        world_size (`int`): data-parallel ranks.
        batch_size (`int`): packs per rank and micro-batch.
        accumulation (`int`): micro-batches of an optimizer step.
        seed (`int`): of the permutations, not negative.
        shuffle (`bool`, *optional*, defaults to `True`): `False`, for evaluation, reads the sources as planned.

    Raises:
        ValueError: if one of the three counts is below 1.
    """

    def __init__(
        self,
        mixture: PackMixture,
        world_size: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        shuffle: bool = True,
    ):
        for name, value in (("world_size", world_size), ("batch_size", batch_size), ("accumulation", accumulation)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.world_size, self.batch_size, self.global_batch = (
            world_size,
            batch_size,
            world_size * batch_size * accumulation,
        )
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self._sizes = [len(dataset) for dataset in mixture.datasets]
        self._counts = picks_per_epoch(mixture.sources, self._sizes, [dataset.plan for dataset in mixture.datasets])
        self._phases = mixture.phases
        self._mixture = mixture
        self._labels_of_epoch = -1, np.zeros(0, np.int64)
        # The empty packs have no patches.
        self._patches = np.append(mixture.patches_per_pack, np.zeros(len(self._sizes), np.int64))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through.

        Args:
            epoch (`int`): from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        packs = (sum(self._counts[source] for source in phase) for phase in self._phases)
        return sum(-(-number // self.global_batch) * self.global_batch for number in packs)

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        for phase in self._phases:
            packs = self._phase_order(phase, epoch)
            for start in range(0, len(packs), self.global_batch):
                yield from self._deal(packs[start : start + self.global_batch]).tolist()

    def labels_of_step(self, step: int) -> int:
        """Labels that a step of the run is planned to have, on all ranks; steps count from 0 over all epochs."""
        epoch, step = divmod(step, len(self) // self.global_batch)
        if self._labels_of_epoch[0] != epoch:
            packs = np.concatenate([self._phase_order(phase, epoch) for phase in self._phases])
            labels = np.append(self._mixture.labels_per_pack, np.zeros(len(self._sizes), np.int64))[packs]
            self._labels_of_epoch = epoch, labels.reshape(-1, self.global_batch).sum(1)
        return int(self._labels_of_epoch[1][step])

    def _phase_order(self, phase: list[int], epoch: int) -> np.ndarray:
        """Indices of a phase's packs, filled up to whole optimizer steps."""
        counts = [self._counts[source] for source in phase]
        turns = _interleave(counts) if self.shuffle else np.repeat(np.arange(len(phase), dtype=np.int32), counts)
        missing = -len(turns) % self.global_batch
        order = np.full(len(turns) + missing, sum(self._sizes) + phase[0])
        for turn, source in enumerate(phase):
            first = sum(self._sizes[:source])
            order[: len(turns)][turns == turn] = first + self._picks(source, epoch)
        return order

    def _picks(self, source: int, epoch: int) -> np.ndarray:
        """Packs of a source in an epoch: the next `count` of its endless stream of permutations."""
        size, count = self._sizes[source], self._counts[source]
        start, stop = epoch * count, (epoch + 1) * count
        numbers = range(start // size, -(-stop // size))
        stream = np.concatenate([self._permutation(source, number) for number in numbers])
        return stream[start - numbers[0] * size :][:count]

    def _permutation(self, source: int, number: int) -> np.ndarray:
        size = self._sizes[source]
        if not self.shuffle:
            return np.arange(size)
        # Raw words of a bit generator are the same in every version of numpy, which `Generator` does not promise.
        words = np.random.PCG64(np.random.SeedSequence([self.seed, source, number])).random_raw(size)
        return np.argsort(words, kind="stable")

    def _deal(self, packs: np.ndarray) -> np.ndarray:
        """The packs of an optimizer step, most patches first, so that a micro-batch weighs the same on every rank."""
        if not self.shuffle:
            return packs
        packs = packs[np.argsort(-self._patches[packs], kind="stable")]
        # (micro-batch, index in the batch, rank); every other index runs back through the ranks.
        dealt = packs.reshape(-1, self.batch_size, self.world_size)
        dealt[:, 1::2] = dealt[:, 1::2, ::-1].copy()
        return dealt.swapaxes(1, 2).ravel()


def _interleave(counts: list[int]) -> np.ndarray:
    """Whose turn it is: turn `j` of `n` comes at the time `(j + 1/2) / n`, so that shares hold in every prefix."""
    times = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    turns = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return turns[np.argsort(times, kind="stable")]
