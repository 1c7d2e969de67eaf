"""Batches of packs: shapes, boundaries, padding, counts, and the original's joined documents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_qwen2vl import PackingCollator


def make_item(lengths: list[int], images: int = 1, budget: int = 4, **extra) -> dict:
    total = sum(lengths)
    labels = torch.arange(100, 100 + total)
    labels[torch.tensor([0, *lengths]).cumsum(0)[:-1]] = -100 if total else labels[:0]
    return {
        "input_ids": torch.arange(100, 100 + total),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])
        if lengths
        else torch.zeros(0, dtype=torch.int64),
        "labels": labels,
        "pixel_values": torch.zeros(images, 3, 8, 8, dtype=torch.uint8),
        "image_seq_length": budget,
        **extra,
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 7), max_size=5), min_size=1, max_size=4))
def test_boundaries_positions_and_padding_agree(packs):
    if not any(packs):
        packs = [[1], *packs]
    batch = PackingCollator()([make_item(lengths) for lengths in packs])
    longest = max(sum(lengths) for lengths in packs)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (len(packs), longest)
    expected = []
    for lengths in packs:
        tail = longest - sum(lengths)
        expected += [*lengths, tail] if tail else lengths
    assert batch["cu_seq_lens_q"].diff().tolist() == expected
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["cu_seq_lens_q"][-1] == len(packs) * longest
    assert torch.equal(batch["cu_seq_lens_q"], batch["cu_seq_lens_k"])
    assert batch["max_length_q"] == batch["max_length_k"] == max(expected)
    starts = batch["cu_seq_lens_q"][:-1].long()
    assert (batch["position_ids"].flatten()[starts] == 0).all()
    assert (batch["labels"].flatten()[starts] == -100).all()
    for row, lengths in enumerate(packs):
        assert (batch["labels"][row, sum(lengths) :] == -100).all()
    stats = batch["packing_stats"]
    assert stats["tokens"] == sum(map(sum, packs))
    assert stats["documents"] == sum(map(len, packs))
    assert stats["squared_lengths"] == sum(n * n for lengths in packs for n in lengths)
    assert stats["images"] == len(packs)
    assert "attention_mask" not in batch


def test_no_images_gives_no_pixel_values():
    batch = PackingCollator()([make_item([3], images=0)])
    assert "pixel_values" not in batch


def test_pixels_stay_uint8_in_order():
    first, second = make_item([3], images=2), make_item([2], images=1)
    first["pixel_values"][1] = 7
    pixels = PackingCollator()([first, second])["pixel_values"]
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 3, 8, 8))
    assert pixels[:, 0, 0, 0].tolist() == [0, 7, 0]


def test_every_document_dropped():
    batch = PackingCollator()([make_item([], images=0, dropped={"corrupt_image": 2})])
    assert batch["labels"].tolist() == [[-100]]
    assert batch["packing_stats"]["dropped"] == {"corrupt_image": 2}
    assert batch["packing_stats"]["tokens"] == batch["packing_stats"]["documents"] == 0


def test_dropped_counts_add_up():
    items = [
        make_item([2], dropped={"corrupt_image": 1}),
        make_item([2], dropped={"corrupt_image": 2, "moved_member": 1}),
    ]
    assert PackingCollator()(items)["packing_stats"]["dropped"] == {"corrupt_image": 3, "moved_member": 1}


def test_one_budget_per_batch():
    with pytest.raises(ValueError, match=r"\[4, 9\]"):
        PackingCollator()([make_item([2]), make_item([2], budget=9)])


def test_cross_document_attention_runs_on():
    batch = PackingCollator(cross_document_attention=True)([make_item([2, 3]), make_item([4])])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch["labels"].tolist() == [[-100, 101, 102, 103, 104], [-100, 101, 102, 103, -100]]
    assert not any(key.startswith(("cu_seq", "max_length")) for key in batch)


@pytest.mark.parametrize("joined", [False, True])
def test_label_positions_are_those_whose_next_position_is_labelled(joined):
    batch = PackingCollator(cross_document_attention=joined)([make_item([3, 4]), make_item([5]), make_item([])])
    labels = batch["labels"]
    expected = [
        row * labels.shape[1] + t
        for row in range(len(labels))
        for t in range(labels.shape[1] - 1)
        if labels[row, t + 1] != -100
    ]
    assert batch["label_positions"].tolist() == expected
    assert len(expected) == sum(row["labels"] for row in batch["packing_stats"]["rows"])


@pytest.mark.parametrize(("multiple", "length"), [(8, 16), (4, 12), (12, 12), (1, 11), (None, 11)])
def test_rows_are_padded_to_a_multiple(multiple, length):
    batch = PackingCollator(pad_to_multiple_of=multiple)([make_item([5, 6]), make_item([3])])
    assert batch["input_ids"].shape == batch["position_ids"].shape == (2, length)
    assert batch["cu_seq_lens_q"][-1] == 2 * length
    assert batch["packing_stats"]["tokens"] == 14 and batch["packing_stats"]["positions"] == 2 * length
