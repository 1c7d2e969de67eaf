import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_qwen2vl.data.filtering.duplicates import block_masks
from open_qwen2vl.data.filtering.options import MAX_DISTANCE

from .conftest import uid_of


def near_hashes(seed: int, families: int, spread: int) -> list[int]:
    """Hashes in families that differ from their first in up to `spread` bits, and some of no family."""
    drawn = random.Random(seed)
    hashes = []
    for _ in range(families):
        first = drawn.getrandbits(64)
        for _ in range(drawn.randint(1, 6)):
            bits = drawn.sample(range(64), drawn.randint(0, spread))
            hashes.append(first ^ sum(1 << bit for bit in bits))
    drawn.shuffle(hashes)
    return hashes


def keep_greedily(hashes: dict[str, int], distance: int) -> dict[str, str]:
    """By uid that goes, the uid that stays in place of it: the rule, with all hashes against all."""
    groups: dict[int, str] = {}
    for uid in sorted(hashes):
        groups.setdefault(hashes[uid], uid)
    stays: list[int] = []
    keeper = {}
    for value in groups:  # by uid
        near = next((other for other in stays if (value ^ other).bit_count() <= distance), None)
        keeper[value] = groups[value if near is None else near]
        stays += [value] if near is None else []
    return {uid: keeper[value] for uid, value in hashes.items() if keeper[value] != uid}


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, MAX_DISTANCE),
    st.integers(1, 10**8),
    st.randoms(use_true_random=False),
)
def test_near_hashes_agree_in_a_block(value, distance, count, drawn):
    other = value ^ sum(1 << bit for bit in drawn.sample(range(64), distance))
    masks = block_masks(count, distance)
    assert any(value & mask == other & mask for mask in masks)
    # A join finds no more candidates than about one for each hash.
    assert all(mask < 2**64 and 2 ** mask.bit_count() >= count for mask in masks)


@pytest.mark.parametrize("distance", [0, 3, 6])
def test_near_duplicates_equal_the_rule_on_all_pairs(write_score_file, write_hash_file, choose, decisions, distance):
    hashes = {uid_of(number): value for number, value in enumerate(near_hashes(distance, 70, 5))}
    write_score_file("clip", dict.fromkeys(hashes, 1.0))
    write_hash_file({uid: (number + 1, value) for number, (uid, value) in enumerate(hashes.items())})
    expected = keep_greedily(hashes, distance)
    found, report = choose("clip > 0", deduplicate="near", near_distance=distance)
    assert found == sorted(set(hashes) - set(expected))
    assert report.duplicates == len(expected) >= 10
    reasons = {uid: reason for uid, (kept, reason) in decisions().items() if not kept}
    assert reasons == {uid: f"near duplicate of {keeper}" for uid, keeper in expected.items()}


def test_chain_of_near_pictures_does_not_collapse(write_score_file, write_hash_file, choose):
    a, b, c = sorted(uid_of(number) for number in range(3))
    write_score_file("clip", dict.fromkeys((a, b, c), 1.0))
    write_hash_file({a: (1, 0b1), b: (2, 0b1111), c: (3, 0b1111111)})
    assert choose("clip > 0", deduplicate="near")[0] == [a, c]
    assert choose("clip > 0", deduplicate="near", near_distance=6)[0] == [a]


def test_equal_files_keep_the_smallest_uid_of_the_chosen(write_score_file, write_hash_file, choose, decisions):
    a, b, c, d, e = sorted(uid_of(number) for number in range(5))
    write_score_file("clip", {a: 0.1, b: 0.9, c: 0.9, d: 0.9, e: 0.9})
    write_hash_file({a: (7, 1), b: (7, 2), c: (7, 3), d: (None, None)})
    found, report = choose("clip > 0.5", deduplicate="exact")
    assert found == [b, d, e]  # a was not chosen, so b stays; what has no hash is no duplicate
    assert report.duplicates == 1 and report.without_hash == 2
    assert decisions()[c] == (False, f"same image file as {b}")
    assert "1 (2 pairs without an image hash or embedding)" in str(report)
