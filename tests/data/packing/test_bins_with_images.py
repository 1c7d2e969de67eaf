"""Packs that are bounded in tokens and in images."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_qwen2vl import cli
from open_qwen2vl.data import PackedDataset, pack_lengths, plan_packs
from open_qwen2vl.data.packing.bins import lower_bound

ASSET = Path(__file__).parents[2] / "assets" / "packing_ffd.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(ASSET) as arrays:
        return {name: arrays[name].astype(np.int64) for name in arrays.files}


def assert_valid(packs, lengths, images, capacity, max_images) -> int:
    """Checks the packs and returns their number."""
    assert packs.dtype == np.int64 and packs.shape == (len(lengths),)
    assert np.bincount(packs, weights=lengths).max() <= capacity
    assert np.bincount(packs, weights=images).max() <= max_images
    assert np.bincount(packs).min() > 0, "a pack number without documents"
    return int(packs.max()) + 1


def bound(lengths, images, capacity, max_images) -> int:
    return max(lower_bound(lengths, capacity), lower_bound(images[images > 0], max_images))


PROBLEMS = st.tuples(st.integers(1, 300), st.integers(1, 9)).flatmap(
    lambda capacities: st.tuples(
        st.lists(st.tuples(st.integers(1, capacities[0]), st.integers(0, capacities[1])), max_size=60),
        st.just(capacities),
    )
)


@given(PROBLEMS)
@settings(deadline=None, max_examples=150)
def test_no_pack_is_over_either_capacity(problem):
    documents, (capacity, max_images) = problem
    lengths, images = np.array(documents, dtype=np.int64).reshape(-1, 2).T
    packs = pack_lengths(lengths, capacity, images, max_images)
    if not documents:
        assert packs.shape == (0,) and packs.dtype == np.int64
        return
    assert assert_valid(packs, lengths, images, capacity, max_images) >= bound(lengths, images, capacity, max_images)
    assert np.array_equal(packs, pack_lengths(lengths.tolist(), capacity, images.astype(np.uint8), max_images))


@given(PROBLEMS)
@settings(deadline=None, max_examples=50)
def test_a_bound_that_binds_nowhere_changes_nothing(problem):
    documents, (capacity, _) = problem
    lengths, images = np.array(documents, dtype=np.int64).reshape(-1, 2).T
    free = pack_lengths(lengths, capacity)
    assert np.array_equal(pack_lengths(lengths, capacity, images), free)
    assert np.array_equal(pack_lengths(lengths, capacity, images, max(1, int(images.sum()))), free)
    if documents and (most := int(np.bincount(free, weights=images).max())):
        found = pack_lengths(lengths, capacity, images, most)
        assert np.array_equal(found, free) or found.max() <= free.max()


@pytest.mark.parametrize(("max_images", "over"), [(14, 0), (20, 0), (23, 0), (24, 2), (25, 2), (30, 0)])
def test_captions_reach_the_higher_bound(golden, max_images, over):
    """About 23.7 captions fill a pack: fewer images bind, more do not, and at 24 both bounds nearly meet."""
    lengths = golden["captions/lengths"]
    images = np.ones_like(lengths)
    number = assert_valid(pack_lengths(lengths, 4096, images, max_images), lengths, images, 4096, max_images)
    assert number <= bound(lengths, images, 4096, max_images) + over


@pytest.mark.parametrize(("max_images", "ratio"), [(8, 1.03), (14, 1.005), (16, 1.005)])
def test_texts_take_the_tokens_that_captions_leave(golden, max_images, ratio):
    """Every fifth document is a text of hundreds of tokens: packs must mix both kinds to reach either bound."""
    rng = np.random.default_rng(0)
    captions = rng.choice(golden["captions/lengths"], 10_000)
    texts = np.clip(rng.lognormal(6.0, 0.9, 10_000), 5, 4096).astype(np.int64)
    is_text = rng.random(10_000) < 0.2
    lengths, images = np.where(is_text, texts, captions), np.where(is_text, 0, 1)
    number = assert_valid(pack_lengths(lengths, 4096, images, max_images), lengths, images, 4096, max_images)
    assert number <= ratio * bound(lengths, images, 4096, max_images)


def test_conversations_of_large_images():
    """At 729 tokens an image a pack holds about four."""
    rng = np.random.default_rng(0)
    lengths = np.clip(729 + rng.lognormal(5.3, 0.8, 4000), 740, 4096).astype(np.int64)
    images = np.ones_like(lengths)
    for max_images, ratio in ((2, 1.002), (3, 1.02), (4, 1.03), (6, 1.006)):
        number = assert_valid(pack_lengths(lengths, 4096, images, max_images), lengths, images, 4096, max_images)
        assert number <= ratio * bound(lengths, images, 4096, max_images)


def test_a_capacity_beyond_any_context_needs_no_states():
    lengths = np.random.default_rng(0).integers(1, 2**30, 200)
    images = np.random.default_rng(1).integers(0, 4, 200)
    assert_valid(pack_lengths(lengths, 2**30, images, 5), lengths, images, 2**30, 5)


@pytest.mark.parametrize(
    ("images", "max_images", "message"),
    [
        ([1, 5, 1], 4, r"images\[1\] is 5, must be between 0 and max_images=4"),
        ([1, 1, -1], 4, r"images\[2\] is -1"),
        ([1, 1], 4, "max_images needs the images of 3 documents, got 2"),
        (None, 4, "max_images needs the images of 3 documents, got 0"),
        ([1.0, 1.0, 1.0], 4, "images must be a flat list of integers"),
        ([1, 1, 1], 0, "max_images must be a positive integer, got 0"),
        ([1, 1, 1], 2.5, "max_images must be a positive integer, got 2.5"),
    ],
)
def test_wrong_images_are_named(images, max_images, message):
    with pytest.raises(ValueError, match=message):
        pack_lengths([10, 20, 30], 100, images, max_images)


def write_conversations(folder: Path, make_image) -> Path:
    """Records of 0 to 5 images each, in LLaVA's form."""
    (folder / "images").mkdir()
    records = []
    for i in range(24):
        names = [f"{i}-{j}.png" for j in range(i % 6)]
        for name in names:
            make_image(folder / "images" / name)
        turns = [
            {"from": "human", "value": "<image>\n" * len(names) + "what is this?"},
            {"from": "gpt", "value": "a cat " * (1 + i % 4)},
        ]
        records.append(
            {"id": f"r{i}", "image": names, "conversations": turns}
            if names
            else {"id": f"r{i}", "conversations": turns}
        )
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def test_a_plan_keeps_the_bound_and_skips_what_is_above(
    caption_tars, tmp_path, tokenizer, processor, capsys, backbones
):
    options = {"image_seq_length": 4, "max_length": 128, "num_workers": 1}
    free = plan_packs(caption_tars, tmp_path / "free", tokenizer, **options)
    assert free.images_per_pack[1] > 3
    report = plan_packs(caption_tars, tmp_path / "bounded", tokenizer, max_images=3, **options)
    assert report.images_per_pack[1] == 3 and report.packs >= 40 and report.documents == free.documents
    assert PackedDataset(tmp_path / "bounded", processor).per_pack("images").max() == 3
    with pytest.raises(ValueError, match="made with max_images 3, now None"):
        plan_packs(caption_tars, tmp_path / "bounded", tokenizer, **options)
    with pytest.raises(ValueError, match="max_images must be at least 1, got 0"):
        plan_packs(caption_tars, tmp_path / "none", tokenizer, max_images=0, **options)

    command = ["pack", *map(str, caption_tars), "--tokenizer", backbones["text"], "--image-seq-length", "4"]
    command += ["--max-length", "128", "--max-images", "3", "--output", str(tmp_path / "command")]
    assert cli.main(command) == 0
    assert str(report) in capsys.readouterr().out


def test_documents_of_too_many_images_are_named(tmp_path, tokenizer, encode):
    from PIL import Image

    def make_image(path: Path) -> None:
        path.write_bytes(encode(Image.new("RGB", (8, 8))))

    data = write_conversations(tmp_path, make_image)
    report = plan_packs(
        [data],
        tmp_path / "packs",
        tokenizer,
        image_seq_length=4,
        max_length=128,
        max_images=3,
        num_workers=1,
        images=[tmp_path / "images"],
    )
    assert report.skipped == {"too_many_images": 8} and report.documents == 16 and report.samples == 24
    assert report.images_per_pack[1] == 3
    rows = pq.read_table(tmp_path / "packs" / "skipped-00000.parquet").to_pylist()
    assert {row["key"] for row in rows} == {f"r{i}" for i in range(24) if i % 6 > 3}
    assert {row["reason"] for row in rows} == {"too_many_images"}
