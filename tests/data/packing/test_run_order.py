"""Schedules of weights and limits on epochs: an order over the whole run, still a function of seed and position."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_qwen2vl.data import PackOrder, parse_sources
from open_qwen2vl.data.packing.mixture import source_phases
from open_qwen2vl.data.packing.weights import describe_sources, loss_weights
from tests.data.packing.test_pack_order import Packs, source_of, steps

SIZES = [400, 100, 50]


def mixture(sizes=SIZES, budgets=None, **entries):
    """As much of a `PackMixture` as an order looks at; `entries` are lists with a value of each source."""
    listed = [
        {"path": str(i), **{name: values[i] for name, values in entries.items() if values[i] is not None}}
        for i in range(len(sizes))
    ]
    sources, datasets = parse_sources(listed), [Packs(range(size)) for size in sizes]
    patches = np.random.default_rng(0).integers(10, 24, sum(sizes))
    phases = source_phases(sources, [{"image_seq_length": budget} for budget in budgets or [4] * len(sizes)])
    return SimpleNamespace(sources=sources, datasets=datasets, patches_per_pack=patches, phases=phases)


def whole_run(packs, split=(1, 1, 4), seed=0, epochs=1.0, max_steps=-1) -> np.ndarray:
    """Indices of a run, (steps, global batch), epoch by epoch as a trainer reads them."""
    order = PackOrder(packs, *split, seed, run=(epochs, max_steps))
    total = max_steps if max_steps > 0 else int(np.ceil(epochs * len(order) / order.global_batch))
    found, epoch = [], 0
    while sum(map(len, found)) < total:
        found.append(steps(order, epoch))
        epoch += 1
    return np.concatenate(found)[:total]


def test_weights_that_change_are_followed_at_each_place():
    run = whole_run(mixture(weight=[{0: 1, 0.5: 1, 1: 0}, {0: 0, 0.5: 0, 1: 1}, 1]), max_steps=500)
    sources = source_of(run, SIZES).reshape(10, 200)
    shares = np.array([np.bincount(part, minlength=3) for part in sources]) / 200
    middles = (np.arange(10) + 0.5) / 10
    assert np.abs(shares[:, 0] - np.interp(middles, [0, 0.5, 1], [0.5, 0.5, 0])).max() < 0.02
    assert np.abs(shares[:, 1] - np.interp(middles, [0, 0.5, 1], [0, 0, 0.5])).max() < 0.02
    assert np.abs(shares[:, 2] - 0.5).max() < 0.02
    # No pack again before all others of its source, over the ends of epochs too.
    reads = Counter(run.ravel().tolist())
    for first, stop in zip(np.cumsum([0, *SIZES[:-1]]), np.cumsum(SIZES), strict=True):
        times = [reads[pack] for pack in range(first, stop)]
        assert max(times) - min(times) <= 1


def test_a_constant_schedule_reads_what_a_weight_reads():
    """The same turns but for ties between sources, which follow from rounding."""
    for run in ({"epochs": 3.0}, {"max_steps": 120}):
        numbers = whole_run(mixture(weight=[0.5, 0.3, 0.2]), **run)
        schedule = whole_run(mixture(weight=[{0: 0.5}, {0: 0.3, 1: 0.3}, 0.2]), **run)
        counts = [np.cumsum(source_of(one, SIZES)[:400, None] == np.arange(3), 0) for one in (numbers, schedule)]
        assert np.abs(counts[0] - counts[1]).max() <= 3


def test_a_source_with_a_limit_is_read_as_often_and_all_along():
    packs = mixture(weight=[0.5, 0.3, 0.2], max_epochs=[None, 2, 1])
    for run in ({"epochs": 1.0}, {"epochs": 2.5}, {"max_steps": 150}):
        sources = source_of(whole_run(packs, **run), SIZES)
        counts = np.bincount(sources)
        assert counts[2] <= 50 and counts[1] <= 200, run
        assert (counts[1:] >= [195, 49]).all() or run["epochs"] == 1.0
        early = np.bincount(sources[: len(sources) // 2], minlength=3)
        assert np.abs(early - counts / 2).max() <= 2
    # What the limited ones leave is shared by the others' weights: here all is of the first.
    (line, *others) = describe(packs, 150)
    assert line.startswith("0: 350 packs in the run (58.3%, weight 0.5 of packs)") and len(others) == 2
    assert "200 packs in the run" in others[0] and "read 2 times (at most 2)" in others[0]


def describe(packs, max_steps):
    plans = [
        {"totals": {"packs": len(one), "tokens": 10 * len(one), "documents": len(one), "labels": 5}, "max_length": 10}
        for one in packs.datasets
    ]
    counts = PackOrder(packs, 1, 1, 4, 0, run=(1.0, max_steps)).counts_of_run
    assert loss_weights(packs.sources, plans) is None
    return describe_sources(packs.sources, plans, counts)


NUMBERS = st.sampled_from([0.0, 0.3, 1.0, 2.0])
WEIGHTS = st.one_of(
    st.sampled_from([0.3, 1.0, 2.0]),
    st.dictionaries(st.sampled_from([0, 0.25, 0.5, 1]), NUMBERS, min_size=1).filter(lambda d: any(d.values())),
)
PROBLEMS = st.lists(st.tuples(st.integers(1, 60), WEIGHTS, st.sampled_from([None, 0.5, 2.0])), min_size=1, max_size=3)


@given(PROBLEMS, st.integers(0, 99), st.sampled_from([-1, 7, 40]), st.sampled_from([0.6, 1.0, 2.3]))
@settings(deadline=None, max_examples=12)
def test_order_of_any_run(problem, seed, max_steps, epochs):
    """Limits hold, every place is filled, and neither split nor a start in the middle changes what a step reads."""
    # One more that may always be read, so that no run is refused.
    sizes, weights, limits = (list(column) for column in zip((23, {0: 1.0}, None), *problem, strict=True))
    packs, run = mixture(sizes, weight=weights, max_epochs=limits), {"max_steps": max_steps, "epochs": epochs}
    found = whole_run(packs, (1, 1, 6), seed, **run)
    assert found.max() < sum(sizes)
    counts = np.bincount(source_of(found, sizes), minlength=len(sizes))
    for count, size, limit in zip(counts, sizes, limits, strict=True):
        assert limit is None or count <= limit * size
    for split in ((2, 3, 1), (6, 1, 1)):
        assert np.array_equal(np.sort(whole_run(packs, split, seed, **run), 1), np.sort(found, 1))
    order = PackOrder(packs, 1, 1, 6, seed, run=(epochs, max_steps))
    per_epoch = len(order) // 6
    (last,) = steps(order, (len(found) - 1) // per_epoch)[(len(found) - 1) % per_epoch][None]
    assert np.array_equal(last, found[-1])


def test_runs_that_cannot_be_had_are_refused():
    limited = mixture(weight=[1, 1, 1], max_epochs=[1, 1, 1])
    with pytest.raises(ValueError, match="the run reads 1,200 packs, more than max_epochs allows, in all 550"):
        PackOrder(limited, 1, 1, 4, 0, run=(1.0, 300))
    # In the second half only a limited one has a weight.
    with pytest.raises(ValueError, match="the run reads 1,200 packs, more than max_epochs allows"):
        weights = [{0: 1, 0.4: 0}, {0: 0, 0.4: 1}, {0: 1, 0.4: 0}]
        PackOrder(mixture(weight=weights, max_epochs=[None, 1, None]), 1, 1, 4, 0, run=(1.0, 300))
    with pytest.raises(ValueError, match="schedules of weights need sources that share batches"):
        PackOrder(mixture(weight=[{0: 1, 1: 2}, 1, 1], budgets=[4, 4, 16]), 1, 1, 4, 0)
