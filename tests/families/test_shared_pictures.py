"""Conversations that share a picture are as if each stood alone with it: logits, loss and gradients, every family."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, PackedDataset, PackingCollator, prepare_for_packing
from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.documents.items import pack_item
from open_qwen2vl.families import packed_model
from open_qwen2vl.modeling.attention import packed_varlen_attention
from open_qwen2vl.trainer.figures.work import step_work
from tests.qwen_vl import FAMILIES
from tests.shared_pictures import write_conversations

ATTENTION = ["eager", "sdpa", "packed_varlen"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


class Case:
    """A family's model, random conversations planned with and without sharing, and what the model says of each."""

    def __init__(self, family: str, seed: int, folder, load):
        self.load = load
        self.model, self.processor = load("sdpa")
        source = write_conversations(folder, seed, clips=int(family != "open_qwen2vl"))
        for name, shares in (("alone", False), ("shared", True)):
            plan_packs([source], folder / name, self.processor, images=(folder / "images",), max_length=400,
                       num_workers=1, share_images=shares)  # fmt: skip
        self.alone, self.shared = (PackedDataset(folder / name, self.processor) for name in ("alone", "shared"))
        self.labels = int(self.alone.per_pack("labels").sum())
        self.loss, self.logits, self.gradients = run(self.model, self.alone, self.labels, one_by_one=True)


def names_of(rows: list[dict]) -> list[tuple]:
    """Of each document its name, its positions and those that it shares."""
    return [((row["key"], str(row["entries"])), row["tokens"], row["shared"]) for row in rows]


def batches(dataset: PackedDataset, one_by_one: bool):
    """Batches of two packs with the documents of each row, or of one document each."""
    items = [dataset[i] for i in range(len(dataset))]
    assert not any(item["dropped"] for item in items)
    if one_by_one:
        for i in range(len(dataset)):
            for row in dataset._documents(i):
                rows = dataset._open_files().reader.read([row])
                yield PackingCollator()([pack_item(dataset.documents, rows, Counter())]), [names_of([row])]
        return
    for start in range(0, len(items), 2):
        chosen = range(start, min(start + 2, len(items)))
        yield PackingCollator()([items[i] for i in chosen]), [names_of(dataset._documents(i)) for i in chosen]


def run(model, dataset: PackedDataset, labels: int, one_by_one: bool = False):
    """Loss over all labels, logits of each document behind what it shares, and gradients."""
    model.zero_grad()
    total, found = 0.0, {}
    for batch, names in batches(dataset, one_by_one):
        batch.pop("packing_stats")
        output = model(**batch, num_items_in_batch=labels, skip_logits=False)
        output.loss.backward()
        total += output.loss.item()
        for logits, row in zip(output.logits.detach(), names, strict=True):
            start = 0
            for name, tokens, shared in row:
                found[name] = logits[start : start + tokens], shared
                start += tokens
    return total, found, {name: p.grad.clone() for name, p in model.named_parameters()}


CASES = [(family, 0) for family in ("open_qwen2vl", *FAMILIES)]
# Other random conversations.
SLOW = [pytest.param((family, seed), marks=pytest.mark.slow) for seed in range(1, 5) for family, _ in CASES]


@pytest.fixture(scope="module", params=[*CASES, *SLOW], ids=lambda case: f"{case[0]}-{case[1]}")
def case(request, tmp_path_factory, backbones, qwen_vl_folder, processor) -> Case:
    family, seed = request.param

    def load(attention: str):
        if family == "open_qwen2vl":
            torch.manual_seed(0)
            options = {"image_seq_length": 4, "attn_implementation": attention}
            return OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, **options), processor
        own = AutoProcessor.from_pretrained(qwen_vl_folder(family))
        model = AutoModelForImageTextToText.from_pretrained(qwen_vl_folder(family))
        prepare_for_packing(model, own).set_attn_implementation(attention)
        return model, own

    return Case(family, seed, tmp_path_factory.mktemp("shared"), load)


@pytest.mark.parametrize("attention", ATTENTION)
def test_shared_equals_alone(case, attention):
    model, _ = case.load(attention)
    model.train()
    if attention == "packed_varlen":
        model.activation_checkpointing_enable()
    loss, logits, gradients = run(model, case.shared, case.labels)
    assert loss == pytest.approx(case.loss, abs=1e-5, rel=1e-5)
    assert logits.keys() == case.logits.keys() and sum(shared > 0 for _, shared in logits.values()) > 8
    for name, (own, shared) in logits.items():
        expected = case.logits[name][0][shared : shared + len(own)]
        torch.testing.assert_close(own, expected, atol=1e-5 * max(1, expected.abs().max().item()), rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, case.gradients[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_the_work_is_that_which_is_done(case):
    """Positions, pictures and pairs of attention are counted as computed, in the plan and in the batches alike."""
    totals = case.shared.plan["totals"]
    stats = [batch["packing_stats"] for batch, _ in batches(case.shared, False)]
    for name in ("tokens", "images", "patches", "squared_lengths", "documents"):
        if name != "patches" or case.shared.documents.needs_sizes:
            assert sum(one[name] for one in stats) == totals[name], name
    alone = case.alone.plan["totals"]
    assert totals["documents"] == alone["documents"] and totals["labels"] == alone["labels"]
    assert totals["tokens"] + totals["shared_tokens"] == alone["tokens"]
    assert totals["images"] + totals["shared"] == alone["images"]
    trained = {"projector": 1, "language_model": 1, "vision_tower": 1}
    flops = [
        sum(packed_model(case.model.config).step_flops(case.model.config, step_work(b["packing_stats"]), trained)
            for b, _ in batches(dataset, False))
        for dataset in (case.alone, case.shared)
    ]  # fmt: skip
    assert flops[1] < 0.9 * flops[0]


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_changed_branch_changes_no_other(case, attention):
    model, _ = case.load(attention)
    batch, names = next(batches(case.shared, False))
    del batch["packing_stats"]
    places, start = [], 0
    for _, tokens, shared in names[0]:
        places.append((start, start + tokens, shared))
        start += tokens
    # A branch that another follows.
    index = next(i for i, one in enumerate(places[:-1]) if one[2] and places[i + 1][2])
    first, stop, _ = places[index]
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, first + 1] += 1
    with torch.no_grad():
        before, after = (model(**one, skip_logits=False).logits[0] for one in (batch, changed))
    assert not torch.equal(before[first:stop], after[first:stop])
    assert torch.equal(before[:first], after[:first]) and torch.equal(before[stop:], after[stop:])


def test_what_knows_no_branches_is_refused(case):
    batch, _ = next(batches(case.shared, False))
    del batch["packing_stats"]
    model, _ = case.load("sdpa")
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="shared pictures does not go with flash_attention_2: set packed_varlen"):
        model(**batch)
    with pytest.raises(ValueError, match="cross_document_attention"):
        PackingCollator(cross_document_attention=True)([case.shared[0]])


@settings(max_examples=40, deadline=None)
@given(
    trees=st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 7), min_size=1, max_size=5)), min_size=1,
                   max_size=4),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_varlen_attention_of_branches_equals_each_alone(trees, seed):
    positions = []
    for prefix, branches in trees:
        positions += [*range(prefix + branches[0])]
        for branch in branches[1:]:
            positions += range(prefix, prefix + branch)
    total, generator = len(positions), torch.Generator().manual_seed(seed)
    item = {name: torch.zeros(total, dtype=torch.long) for name in ("input_ids", "labels")}
    batch = PackingCollator()([{**item, "position_ids": torch.tensor(positions)}])
    query = torch.randn(1, 4, total, 8, generator=generator)
    key, value = (torch.randn(1, 2, total, 8, generator=generator) for _ in range(2))
    lengths = {name: batch.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_k", "key_positions")}
    output, _ = packed_varlen_attention(None, query, key, value, None, **lengths)
    start = 0
    for prefix, branches in trees:
        own = start + prefix
        for branch in branches:
            seen = torch.tensor([*range(start, start + prefix), *range(own, own + branch)])
            expected = torch.nn.functional.scaled_dot_product_attention(
                query[:, :, seen], key[:, :, seen], value[:, :, seen], is_causal=True, enable_gqa=True
            )
            torch.testing.assert_close(
                output[:, own : own + branch].transpose(1, 2), expected[:, :, prefix:], atol=1e-6, rtol=1e-5
            )
            own += branch
        start = own
