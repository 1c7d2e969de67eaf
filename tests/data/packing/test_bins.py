"""Packs hold each document once, within the capacity, in never more packs than first-fit-decreasing."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from open_qwen2vl.data import pack_lengths
from open_qwen2vl.data.packing.bins import lower_bound

ASSET = Path(__file__).parents[2] / "assets" / "packing_ffd.npz"

# Lengths with repeats, with few sizes and with many, at capacities from a few tokens to a search-sized one.
PROBLEMS = st.one_of(st.integers(1, 60), st.integers(1, 5000)).flatmap(
    lambda capacity: st.tuples(
        st.lists(st.integers(1, capacity) | st.integers(1, min(capacity, 7)), max_size=80), st.just(capacity)
    )
)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(ASSET) as arrays:
        return {name: arrays[name].astype(np.int64) for name in arrays.files}


def first_fit_decreasing(lengths, capacity: int) -> np.ndarray:
    """The textbook form: each length, the longest first, goes to the first pack that has room for it."""
    packs, room = np.empty(len(lengths), dtype=np.int64), []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        first = next((p for p, left in enumerate(room) if left >= lengths[i]), len(room))
        if first == len(room):
            room.append(capacity)
        room[first] -= int(lengths[i])
        packs[i] = first
    return packs


def fewest_packs(lengths: list[int], capacity: int) -> int:
    """The optimum, by trying every pack for every length."""

    def fits(rest: list[int], room: list[int]) -> bool:
        if not rest:
            return True
        trials = (room[:p] + [left - rest[0]] + room[p + 1 :] for p, left in enumerate(room) if left >= rest[0])
        return any(fits(rest[1:], trial) for trial in trials)

    return next(packs for packs in range(len(lengths) + 1) if fits(lengths, [capacity] * packs))


def caption_and_document_lengths(n: int, seed: int) -> np.ndarray:
    """Four captions for every interleaved document of 1 to 9 images with text, cut at 4096; 144 tokens an image."""
    rng = np.random.default_rng(seed)
    captions = 146 + rng.lognormal(3.2, 0.6, n).astype(np.int64)
    documents = 2 + 145 * rng.integers(1, 10, n) + rng.lognormal(6.0, 0.9, n).astype(np.int64)
    return np.minimum(np.where(rng.random(n) < 0.2, documents, captions), 4096)


def assert_valid(packs: np.ndarray, lengths, capacity: int) -> int:
    """Checks the packs and returns their number."""
    assert packs.dtype == np.int64 and packs.shape == (len(lengths),)
    tokens = np.bincount(packs, weights=lengths)  # fails for a negative number; an item is in one pack by its form
    assert tokens.max() <= capacity
    assert tokens.min() > 0, "a pack number without items"
    return len(tokens)


@given(PROBLEMS)
@example(([1] * 80, 1))
@example(([7] * 80, 5000))
@settings(deadline=None, max_examples=200)
def test_packs_are_exact_and_never_more_than_ffd(problem):
    lengths, capacity = problem
    packs = pack_lengths(lengths, capacity)
    if not lengths:
        assert packs.shape == (0,)
        return
    number = assert_valid(packs, lengths, capacity)
    assert lower_bound(lengths, capacity) <= number <= first_fit_decreasing(lengths, capacity).max() + 1


def test_two_packs_where_ffd_takes_three():
    assert first_fit_decreasing([4, 4, 3, 3, 3, 3], 10).max() + 1 == 3
    assert pack_lengths([4, 4, 3, 3, 3, 3], 10).max() + 1 == 2


@given(PROBLEMS)
@settings(deadline=None, max_examples=50)
def test_same_packs_for_every_form_of_the_same_lengths(problem):
    lengths, capacity = problem
    packs = pack_lengths(lengths, capacity)
    strided = np.repeat(np.array(lengths, dtype=np.int64), 2)[::2]
    read_only = np.array(lengths, dtype=np.uint16)
    read_only.flags.writeable = False
    for form in (tuple(lengths), np.array(lengths, dtype=np.int32), np.array(lengths, np.int64), strided, read_only):
        assert np.array_equal(pack_lengths(form, np.int64(capacity)), packs)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
@settings(deadline=None)
def test_the_optimum_lies_between_the_bound_and_the_packs(lengths):
    best = fewest_packs(lengths, 12)
    assert lower_bound(lengths, 12) <= best <= pack_lengths(lengths, 12).max() + 1


def test_the_bound_counts_long_documents_that_nothing_joins():
    assert lower_bound([2, 2, 2], 3) == 3
    assert lower_bound([7, 7, 4], 10) == 3  # the sum alone gives 2: no 4 fits beside a 7
    assert lower_bound([10, 1, 1], 10) == 2
    assert lower_bound([], 10) == 0


def test_the_reference_of_these_tests_is_the_golden_ffd(golden):
    for name in ("captions_1k", "captions", "interleaved_1k", "mixed_1k"):
        bins = first_fit_decreasing(golden[f"{name}/lengths"].tolist(), 4096)
        assert np.array_equal(bins, golden[f"{name}/bin_of_item"])


@pytest.mark.parametrize(
    ("name", "ffd", "most"),
    [("captions_1k", 43, 42), ("captions", 429, 422), ("interleaved_1k", 300, 299), ("mixed_1k", 92, 91)],
)
def test_golden_lengths_reach_their_lower_bound(golden, name, ffd, most):
    lengths = golden[f"{name}/lengths"]
    assert golden[f"{name}/bin_of_item"].max() + 1 == ffd
    packs = pack_lengths(lengths, 4096)
    assert assert_valid(packs, lengths, 4096) == most == lower_bound(lengths, 4096)
    assert np.array_equal(packs, pack_lengths(lengths.tolist(), 4096))
    for length in np.unique(lengths):  # equal lengths are dealt in their order
        assert (np.diff(packs[lengths == length]) >= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_ffd_stays_where_the_passes_find_nothing_better(seed):
    lengths = np.random.default_rng(seed).integers(270, 670, 300)  # packs of two and three: no pass reaches FFD here
    packs = pack_lengths(lengths, 1000)
    assert assert_valid(packs, lengths, 1000) <= first_fit_decreasing(lengths.tolist(), 1000).max() + 1


@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_mixed_lengths_need_at_most_two_packs_more_than_the_bound(seed):
    lengths = caption_and_document_lengths(10_000, seed)
    number = assert_valid(pack_lengths(lengths, 4096), lengths, 4096)
    assert number <= lower_bound(lengths, 4096) + 2


def test_documents_of_about_a_quarter_pack_gain_from_the_passes():
    """Conversations at 729 tokens an image: FFD pairs like with like and loses 6 % of the tokens."""
    rng = np.random.default_rng(0)
    lengths = np.clip(729 + rng.lognormal(5.3, 0.8, 4000), 740, 4096).astype(np.int64)
    number = assert_valid(pack_lengths(lengths, 4096), lengths, 4096)
    assert number <= 1.006 * lower_bound(lengths, 4096)
    assert number <= 0.95 * (first_fit_decreasing(lengths.tolist(), 4096).max() + 1)


@pytest.mark.parametrize("capacity", [8_192, 32_768])
def test_packs_of_many_short_documents_fill_up(golden, capacity):
    """48 and 195 captions a pack: as many as, or more than, the candidates that a pack is completed from."""
    lengths = np.random.default_rng(0).choice(golden["captions/lengths"], 100_000)
    number = assert_valid(pack_lengths(lengths, capacity), lengths, capacity)
    assert number <= lower_bound(lengths, capacity) + 1


@pytest.mark.parametrize(
    ("length", "packs"), [(1, 245), (173, 43_479), (1366, 500_000), (2049, 1_000_000), (4096, 1_000_000)]
)
def test_a_million_equal_lengths(length, packs):
    lengths = np.full(1_000_000, length)
    assert assert_valid(pack_lengths(lengths, 4096), lengths, 4096) == packs


def test_a_million_caption_lengths_waste_almost_nothing(golden):
    lengths = np.random.default_rng(0).choice(golden["captions/lengths"], 1_000_000)
    number = assert_valid(pack_lengths(lengths, 4096), lengths, 4096)
    assert number <= lower_bound(lengths, 4096) * 1.0003


def count_steps(lengths, capacity: int) -> int:
    """How many lines of Python a packing runs: what it costs, free of the clock."""
    steps = 0

    def count(frame, event, argument):
        nonlocal steps
        steps += event == "line"
        return count

    previous = sys.gettrace()
    sys.settrace(count)
    try:
        pack_lengths(lengths, capacity)
    finally:
        sys.settrace(previous)
    return steps


def test_ten_times_the_captions_cost_less_than_ten_times_the_work(golden):
    few, many = (np.random.default_rng(0).choice(golden["captions/lengths"], n) for n in (2_000, 20_000))
    assert count_steps(many, 4096) < 10 * count_steps(few, 4096)


def test_lengths_each_of_its_own_size_cost_a_fixed_number_of_steps_each():
    """No histogram helps here; at this capacity first-fit-decreasing stands alone."""
    for n in (500, 5_000):
        assert count_steps(np.random.default_rng(0).integers(1, 10**7, n), 10**7) < 100 * n


@pytest.mark.parametrize("n", [500, 5_000])
def test_the_search_costs_a_fixed_amount_however_many_packs_there_are(n):
    """Packs of two and three, each its own pattern, and a bound that cannot be reached."""
    lengths = np.random.default_rng(0).integers(int(0.27 * 2**21), int(0.67 * 2**21), n)
    assert count_steps(lengths, 2**21) < 1_600_000


def test_a_capacity_beyond_any_context_is_packed_by_ffd():
    lengths = np.random.default_rng(0).integers(1, 2**40, 200)
    packs = pack_lengths(lengths, 2**40)
    assert assert_valid(packs, lengths, 2**40) == first_fit_decreasing(lengths.tolist(), 2**40).max() + 1


def test_the_lengths_are_left_as_they_were(golden):
    lengths = golden["mixed_1k/lengths"].copy()
    pack_lengths(lengths, 4096)
    assert np.array_equal(lengths, golden["mixed_1k/lengths"])


@pytest.mark.parametrize("lengths", [[], (), np.array([]), np.zeros(0, dtype=np.int32)])
def test_no_lengths_give_no_packs(lengths):
    packs = pack_lengths(lengths, 4096)
    assert packs.shape == (0,) and packs.dtype == np.int64


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5, 0, 3], r"lengths\[1\] is 0, must be between 1 and max_length=10"),
        ([5, 3, -2, -4], r"lengths\[2\] is -2"),
        (np.array([11, 12], dtype=np.uint8), r"lengths\[0\] is 11"),
        (np.array([1, 2**63], dtype=np.uint64), r"lengths\[1\] is 9223372036854775808"),
        ([1.0, 2.0], "flat list of integers.*float64"),
        ([1, float("nan")], "flat list of integers"),
        ([True, False], "flat list of integers.*bool"),
        (["3"], "flat list of integers"),
        ([[1, 2], [3, 4]], r"flat list of integers.*\(2, 2\)"),
        (5, r"flat list of integers.*\(\)"),
        ([1, 2**70], "flat list of integers"),
    ],
)
def test_wrong_lengths_are_named(lengths, message):
    with pytest.raises(ValueError, match=message):
        pack_lengths(lengths, 10)


@pytest.mark.parametrize("max_length", [0, -1, 4096.0, True, None, "4096"])
def test_a_wrong_capacity_is_named(max_length):
    with pytest.raises(ValueError, match="max_length must be a positive integer"):
        pack_lengths([1], max_length)
