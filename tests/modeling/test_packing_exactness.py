"""A document in a pack sees only itself: logits, loss and gradients equal those of the document alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_qwen2vl import PackingCollator
from open_qwen2vl.modeling.attention import packed_varlen_attention
from open_qwen2vl.modeling.modeling_open_qwen2vl import OpenQwen2VLForConditionalGeneration
from tests.modeling.packs import forward_inputs, join, make_document

CAPTIONS = ["a cat", "two dogs run in the park", "x", "blue and green squares, red circles on a mat"]
ATTENTION = ["eager", "sdpa", "packed_varlen"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def load(backbones, attention: str) -> OpenQwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    return OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(
        **backbones, image_seq_length=4, attn_implementation=attention
    )


@pytest.fixture(scope="module")
def documents(tokenizer) -> list[dict]:
    return [make_document(tokenizer, caption, seed) for seed, caption in enumerate(CAPTIONS)]


def alone(model, documents: list[dict]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits of each document, and the summed loss of all over the number of their labels."""
    logits, loss, labels = [], 0.0, sum(int((d["labels"][1:] != -100).sum()) for d in documents)
    for document in documents:
        output = model(
            input_ids=document["input_ids"][None],
            pixel_values=document["pixel_values"],
            labels=document["labels"][None],
            num_items_in_batch=labels,
            skip_logits=False,
        )
        logits.append(output.logits[0])
        loss = loss + output.loss
    return logits, loss


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("packs", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_alone(backbones, documents, attention, train, packs, checkpointing):
    model = load(backbones, attention).train(train)
    if checkpointing:
        model.activation_checkpointing_enable()
    solo_logits, solo_loss = alone(model, documents)
    solo_loss.backward()
    solo_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    rows = [documents] if packs == 1 else [documents[:1], documents[1:]]
    # use_cache is left unset on purpose: a cache would join the documents.
    output = model(**forward_inputs([join(row) for row in rows]), skip_logits=False)
    output.loss.backward()

    torch.testing.assert_close(output.loss, solo_loss, **TOLERANCE)
    for row, logits in zip(rows, output.logits, strict=True):
        start = 0
        for document in row:
            length = len(document["input_ids"])
            expected = solo_logits[next(i for i, d in enumerate(documents) if d is document)]
            torch.testing.assert_close(logits[start : start + length], expected, **TOLERANCE)
            start += length
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, solo_gradients[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_changed_document_changes_no_other(backbones, documents, attention):
    model = load(backbones, attention)
    changed = dict(documents[0], pixel_values=255 - documents[0]["pixel_values"])
    before = model(**forward_inputs([join(documents)])).logits[0]
    after = model(**forward_inputs([join([changed, *documents[1:]])])).logits[0]
    first = len(documents[0]["input_ids"])
    assert not torch.equal(before[:first], after[:first])
    assert torch.equal(before[first:], after[first:])


def test_the_original_way_joins_documents(backbones, documents):
    model = load(backbones, "sdpa")
    batch = PackingCollator(cross_document_attention=True)([join(documents)])
    batch.pop("packing_stats")
    assert "cu_seq_lens_q" not in batch
    isolated = model(**forward_inputs([join(documents)])).logits[0]
    joined = model(**batch).logits[0]
    first = len(documents[0]["input_ids"])
    torch.testing.assert_close(joined[:first], isolated[:first], **TOLERANCE)
    assert (joined[first:] - isolated[first:]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(1, 1)}, "attention_mask"),
        ({"use_cache": True}, "cache"),
        ({"position_ids": None}, "position_ids"),
    ],
)
def test_what_would_join_documents_is_an_error(backbones, documents, changes, message):
    with pytest.raises(ValueError, match=message):
        load(backbones, "sdpa")(**forward_inputs([join(documents)]) | changes)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    groups=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_varlen_attention_equals_each_document_alone(lengths, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    query = torch.randn(1, 4, total, 8, generator=generator)
    key, value = (torch.randn(1, 4 // groups, total, 8, generator=generator) for _ in range(2))
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    output, _ = packed_varlen_attention(
        None, query, key, value, None, cu_seq_lens_q=boundaries, max_length_q=max(lengths)
    )
    for start, length in zip(boundaries.tolist(), lengths, strict=False):
        part = slice(start, start + length)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, part],
            key[:, :, part].repeat_interleave(groups, 1),
            value[:, :, part].repeat_interleave(groups, 1),
            is_causal=True,
        )
        torch.testing.assert_close(output[:, part].transpose(1, 2), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
def test_autocast_keeps_documents_apart(backbones, documents, attention):
    """Under autocast RoPE gives fp32 queries and keys beside bf16 values."""
    model = load(backbones, attention).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**forward_inputs([join(documents)]), skip_logits=False)
        expected, _ = alone(model, documents)
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits[0], torch.cat(expected), atol=0.25, rtol=0.05)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_packed_batch_without_images_evaluates_like_one_with(backbones, tokenizer):
    """On several ranks evaluation, too, has to run the same collectives whether a rank's packs have images or not."""
    model = load(backbones, "packed_varlen")
    ran = []
    model.model.multi_modal_projector.register_forward_hook(lambda *_: ran.append(1))
    ids = torch.tensor(tokenizer("a cat on a mat")["input_ids"])
    item = {
        "input_ids": ids,
        "position_ids": torch.arange(len(ids)),
        "labels": ids.clone(),
        "pixel_values": torch.empty(0, 3, 32, 32, dtype=torch.uint8),
        "image_seq_length": 4,
    }
    logits = model(**forward_inputs([item])).logits
    assert ran
    torch.testing.assert_close(logits, model(input_ids=ids[None]).logits, **TOLERANCE)
