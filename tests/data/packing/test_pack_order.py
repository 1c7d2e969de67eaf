"""The order of packs: shares, repeats, phases, steps that do not depend on the split, and ranks of equal load."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from open_qwen2vl.data import PackMixture, PackOrder, Source, parse_sources, plan_packs
from open_qwen2vl.data.packing.mixture import source_phases


class Packs(list):
    """As much of a `PackedDataset` as an order looks at: the number of packs."""

    plan: dict = {}


def mixture(*sizes, weights=None, epochs=None, budgets=None, seed=0):
    """As much of a `PackMixture` as an order looks at; packs of 10 to 23 patches."""
    datasets = [Packs(range(size)) for size in sizes]
    sources = [
        Source(str(i), "", weight=weights[i]) if weights else Source(str(i), "", epochs=epochs[i] if epochs else 1.0)
        for i in range(len(sizes))
    ]
    patches = np.random.default_rng(seed).integers(10, 24, sum(sizes))
    phases = source_phases(sources, [{"image_seq_length": budget} for budget in budgets or [144] * len(sizes)])
    return SimpleNamespace(sources=sources, datasets=datasets, patches_per_pack=patches, phases=phases)


def steps(order: PackOrder, epoch: int = 0) -> np.ndarray:
    """Indices of an epoch, (steps, global batch)."""
    order.set_epoch(epoch)
    indices = list(order)
    assert len(indices) == len(order) and all(type(index) is int for index in indices)
    return np.array(indices).reshape(-1, order.global_batch)


def source_of(packs, sizes) -> np.ndarray:
    """Source of each pack; empty packs left out."""
    packs = np.asarray(packs).ravel()
    return np.searchsorted(np.cumsum(sizes), packs[packs < sum(sizes)], side="right")


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=4)
SPLITS = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
MIXTURES = SIZES.flatmap(
    lambda sizes: st.tuples(
        st.just(sizes),
        st.lists(st.sampled_from([0.3, 0.5, 1.0, 1.7, 2.0]), min_size=len(sizes), max_size=len(sizes)),
        st.lists(st.sampled_from([144, 729]), min_size=len(sizes), max_size=len(sizes)),
    )
)


@given(MIXTURES, SPLITS, st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_each_pack_as_often_as_asked_and_padding_only_at_the_ends_of_phases(problem, split, seed):
    sizes, epochs, budgets = problem
    packs = mixture(*sizes, epochs=epochs, budgets=budgets)
    total = sum(sizes)
    order = PackOrder(packs, *split, seed=seed)
    read = [Counter() for _ in sizes]
    for epoch in range(3):
        found = steps(order, epoch)
        sources = source_of(found, sizes)
        wanted = [max(1, round(share * size)) for share, size in zip(epochs, sizes, strict=True)]
        assert np.bincount(sources, minlength=len(sizes)).tolist() == wanted
        # A phase after the other, each of whole steps, in the order of first appearance.
        budget_of = np.array([*(budgets[s] for s in source_of(range(total), sizes)), *budgets])
        phases = budget_of[found]
        assert (phases == phases[:, :1]).all()
        changes = np.flatnonzero(np.diff(phases[:, 0])) + 1
        assert list(dict.fromkeys(budgets)) == [phases[0, 0], *phases[changes, 0]]
        last = {*(changes - 1).tolist(), len(found) - 1}
        padded = set(np.flatnonzero((found >= total).any(1)).tolist())
        assert padded <= last and not (found >= total).all(1).any()
        for pack in found[found < total].tolist():
            read[int(source_of([pack], sizes)[0])][pack] += 1
        # Nothing a time more than once more than another of its source.
        for size, counts in zip(sizes, read, strict=True):
            times = list(counts.values()) + [0] * (size - len(counts))
            assert max(times) - min(times) <= 1


@given(MIXTURES, st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_the_packs_of_a_step_do_not_depend_on_the_split(problem, seed):
    sizes, epochs, budgets = problem
    packs = mixture(*sizes, epochs=epochs, budgets=budgets)
    whole = np.sort(steps(PackOrder(packs, 1, 1, 12, seed)), axis=1)
    for split in ((2, 3, 2), (12, 1, 1), (3, 4, 1), (1, 12, 1), (4, 1, 3)):
        assert np.array_equal(np.sort(steps(PackOrder(packs, *split, seed)), axis=1), whole)


@given(SIZES, st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_shares_hold_in_every_prefix(sizes, seed):
    found = steps(PackOrder(mixture(*sizes), 1, 1, 1, seed)).ravel()
    sources = source_of(found, sizes)
    counts = np.cumsum(sources[:, None] == np.arange(len(sizes)), axis=0)
    expected = np.arange(1, len(found) + 1)[:, None] * np.array(sizes) / sum(sizes)
    assert np.abs(counts - expected).max() <= 0.5 + len(sizes) / 2


def test_weights_read_the_relatively_largest_source_once():
    packs = mixture(1000, 100, 50, weights=[0.5, 0.3, 0.2])
    found = steps(PackOrder(packs, 2, 1, 2, seed=0))
    counts = np.bincount(source_of(found, [1000, 100, 50]))
    assert counts.tolist() == [1000, 600, 400]
    repeats = Counter(found[found < 1150].tolist())
    assert {repeats[i] for i in range(1000)} == {1} and {repeats[i] for i in range(1000, 1100)} == {6}
    assert {repeats[i] for i in range(1100, 1150)} == {8}
    # The largest for its weight, not the largest.
    counts = PackOrder(mixture(1000, 100, weights=[100, 1]), 1, 1, 1, 0)
    assert len(counts) == 100 * 100 + 100
    assert len(PackOrder(mixture(10**6, 3, weights=[1e9, 1e-9]), 1, 1, 1, 0)) > 10**6


def test_an_order_is_a_function_of_mixture_seed_and_epoch():
    packs = mixture(300, 200)
    first = steps(PackOrder(packs, 2, 2, 4, seed=1))
    assert np.array_equal(first, steps(PackOrder(packs, 2, 2, 4, seed=1)))
    assert not np.array_equal(first, steps(PackOrder(packs, 2, 2, 4, seed=2)))
    order = PackOrder(packs, 2, 2, 4, seed=1)
    second = steps(order, 1)
    assert not np.array_equal(first, second) and np.array_equal(first, steps(order, 0))
    # Pinned: it must not change with the version of numpy, or a run would not go on as it began.
    assert list(PackOrder(mixture(8), 1, 1, 1, seed=0)) == [3, 2, 1, 6, 0, 7, 4, 5]


def test_packs_are_not_sorted_by_anything_over_the_steps():
    """A planner numbers its packs from long to short."""
    found = steps(PackOrder(mixture(6400), 2, 2, 4, seed=0))
    means = found[:, :].mean(1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15
    assert means.std() < 2 * 6400 / 12**0.5 / 4


@pytest.mark.parametrize("split", [(8, 1, 4), (8, 2, 2), (4, 4, 2)])
def test_ranks_of_a_micro_step_carry_about_equal_numbers_of_patches(split):
    packs = mixture(3200)
    world, batch, accumulation = split
    patches = packs.patches_per_pack
    load = patches[steps(PackOrder(packs, *split, seed=0))].reshape(-1, accumulation, world, batch).sum(3)
    unsorted = patches[np.random.default_rng(0).permutation(3200)].reshape(-1, accumulation, world, batch).sum(3)
    spread, spread_unsorted = (np.ptp(x, axis=2).mean() for x in (load, unsorted))
    assert spread < 0.35 * spread_unsorted
    # What the ranks wait for the fullest one.
    waited, waited_unsorted = ((x.max(2) - x.mean(2)).mean() for x in (load, unsorted))
    assert waited < 0.35 * waited_unsorted


def test_evaluation_reads_in_order():
    packs = mixture(5, 3, budgets=[144, 144])
    assert list(PackOrder(packs, 2, 1, 1, seed=0, shuffle=False)) == list(range(8))
    assert list(PackOrder(packs, 3, 1, 1, seed=0, shuffle=False)) == [*range(8), 8]
    packs = mixture(5, 3, budgets=[144, 729])
    assert list(PackOrder(packs, 2, 1, 1, seed=0, shuffle=False)) == [*range(5), 8, 5, 6, 7, 9]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_accelerate_deals_the_batches_and_skips_exactly(world):
    packs = mixture(37, 20, budgets=[144, 729])
    batch, accumulation = 2, 2
    order = PackOrder(packs, world, batch, accumulation, seed=3)
    whole = steps(order, 1).reshape(-1, world, batch)
    for skipped in (0, 1, 5):
        for rank in range(world):
            order = PackOrder(packs, world, batch, accumulation, seed=3)
            loader = DataLoader(range(57 + 2), batch_size=batch, sampler=order)
            loader = prepare_data_loader(loader, num_processes=world, process_index=rank, put_on_device=False)
            assert len(loader) == len(whole)
            loader = skip_first_batches(loader, skipped)
            loader.set_epoch(1)
            # Behind a skip the loader does not find the sampler where there are several processes.
            order.set_epoch(1)
            found = np.array([b.tolist() for b in loader])
            assert np.array_equal(found, whole[skipped:, rank])


def test_an_epoch_through_a_real_mixture(tmp_path, make_tar, sample, tokenizer, processor):
    for name, budget in (("a", 4), ("b", 16)):
        tar = make_tar(tmp_path / f"{name}.tar", [m for i in range(9) for m in sample(f"{i}", "cat " * i + "x")])
        plan_packs([tar], tmp_path / name, tokenizer, image_seq_length=budget, max_length=48, num_workers=1)
    entries = [{"path": str(tmp_path / "a")}, {"path": str(tmp_path / "b")}]
    packs = PackMixture(parse_sources(entries), processor)
    items = [packs[index] for index in PackOrder(packs, 2, 1, 2, seed=0)]
    assert [item["image_seq_length"] for item in items] == sorted(item["image_seq_length"] for item in items)
    assert Counter(item["pack"] for item in items if len(item["input_ids"])) == Counter(range(len(packs)))
    assert sum(len(item["pixel_values"]) for item in items) == 18 and len(items) % 4 == 0


@pytest.mark.parametrize("split", [(0, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_counts_below_one_are_named(split):
    with pytest.raises(ValueError, match="(world_size|batch_size|accumulation) must be at least 1"):
        PackOrder(mixture(3), *split, seed=0)
