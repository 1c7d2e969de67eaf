"""The loss of selected positions equals the loss of full logits, value and gradients."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from open_qwen2vl.modeling import loss as loss_module
from open_qwen2vl.modeling.loss import selected_position_loss


def make_case(labelled: float = 0.3, vocabulary: int = 50, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 20, 16, generator=generator, requires_grad=True)
    head = torch.nn.Linear(16, vocabulary, bias=False)
    torch.nn.init.normal_(head.weight, generator=generator)
    labels = torch.randint(0, vocabulary, (2, 20), generator=generator)
    labels[torch.rand(2, 20, generator=generator) > labelled] = -100
    return hidden, head, labels


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, head.weight])


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(13)])
@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_equals_full_logits(monkeypatch, num_items, chunk_rows):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_rows * 50 * 4)
    hidden, head, labels = make_case()
    ours = selected_position_loss(hidden, head, labels, num_items)
    full = ForCausalLMLoss(head(hidden), labels, vocab_size=50, num_items_in_batch=num_items)
    torch.testing.assert_close(ours, full, atol=1e-6, rtol=1e-6)
    # A factor stands for the scaling of gradient accumulation.
    for mine, theirs in zip(gradients(ours * 3, hidden, head), gradients(full * 3, hidden, head), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk_rows", [3, 1000])
def test_rows_count_as_their_weights_say(monkeypatch, chunk_rows):
    """Sum and gradients; the divisor and the losses of rows are those without weights."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_rows * 50 * 4)
    hidden, head, labels = make_case()
    weights = torch.tensor([0.25, 3.0])
    loss, rows = selected_position_loss(hidden, head, labels, 7, True, loss_weights=weights)
    assert torch.equal(rows, selected_position_loss(hidden, head, labels, 7, True)[1])
    alone = [ForCausalLMLoss(head(hidden[i : i + 1]), labels[i : i + 1], 50, 7) for i in (0, 1)]
    expected = 0.25 * alone[0] + 3 * alone[1]
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for mine, theirs in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0), 5])
def test_no_supervised_position_is_zero_with_a_graph(num_items):
    hidden, head, labels = make_case()
    loss = selected_position_loss(hidden, head, torch.full_like(labels, -100), num_items)
    assert loss.item() == 0
    assert all(grad is not None and not grad.any() for grad in gradients(loss, hidden, head))


def test_frozen_head_and_no_grad():
    hidden, head, labels = make_case()
    expected = selected_position_loss(hidden, head, labels)
    (grad,) = torch.autograd.grad(expected, [hidden])
    head.weight.requires_grad_(False)
    frozen = selected_position_loss(hidden, head, labels)
    torch.testing.assert_close(torch.autograd.grad(frozen, [hidden])[0], grad)
    with torch.no_grad():
        torch.testing.assert_close(selected_position_loss(hidden, head, labels), expected)


def test_autocast_computes_in_half_and_returns_float():
    hidden, head, labels = make_case()
    expected = selected_position_loss(hidden, head, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = selected_position_loss(hidden, head, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0.05, rtol=0.02)
    grads = gradients(loss, hidden, head)
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]


def test_memory_holds_no_full_logits_matrix():
    hidden = torch.randn(1, 64, 8, requires_grad=True)
    head = torch.nn.Linear(8, 4096, bias=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        selected_position_loss(hidden, head, torch.randint(0, 4096, (1, 64)))
    assert max(saved) <= head.weight.numel()


def test_accumulation_splits_agree():
    """Unequal label counts over micro-batches weigh every token the same, whatever the split."""
    hidden, head, labels = make_case()
    labels[0, 2:] = -100
    items = int((labels[:, 1:] != -100).sum())
    whole = selected_position_loss(hidden, head, labels, items)
    split = sum(selected_position_loss(hidden[i : i + 1], head, labels[i : i + 1], items) for i in range(2))
    torch.testing.assert_close(whole, split)
    torch.testing.assert_close(gradients(whole, hidden, head)[1], gradients(split, hidden, head)[1])


def test_row_losses_are_the_undivided_sums_of_each_row():
    hidden, head, labels = make_case()
    labels[1] = -100
    labels[0, 5] = 3
    loss, rows = selected_position_loss(hidden, head, labels, 7, return_row_losses=True)
    expected = ForCausalLMLoss(head(hidden[:1]), labels[:1], vocab_size=50, num_items_in_batch=1)
    assert rows.dtype == torch.float32 and not rows.requires_grad
    torch.testing.assert_close(rows, torch.stack([expected.detach(), torch.zeros(())]))
    torch.testing.assert_close(loss, expected / 7)
    plain = selected_position_loss(hidden, head, labels, 7)
    for mine, theirs in zip(gradients(loss, hidden, head), gradients(plain, hidden, head), strict=True):
        assert torch.equal(mine, theirs)


def test_positions_from_the_collator_change_nothing():
    hidden, head, labels = make_case()
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    positions = torch.nonzero(targets.flatten() != -100).squeeze(1)
    given = selected_position_loss(hidden, head, labels, return_row_losses=True, label_positions=positions)
    found = selected_position_loss(hidden, head, labels, return_row_losses=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(given, found, strict=True))


def test_bf16_gradients_are_added_up_in_fp32(monkeypatch):
    hidden, head, labels = make_case(labelled=1.0)
    hidden, head = hidden.detach().bfloat16().requires_grad_(), head.bfloat16()
    whole = gradients(selected_position_loss(hidden, head, labels), hidden, head)
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 50 * 2)  # a chunk per position
    monkeypatch.setattr(loss_module, "HEAD_SLICE", 7)
    chunked = gradients(selected_position_loss(hidden, head, labels), hidden, head)
    for mine, theirs in zip(chunked, whole, strict=True):
        assert mine.dtype == torch.bfloat16
        # One rounding to bf16 at the end on either side: 38 roundings on the way would be off by several times that.
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2**-7)


def test_a_second_backward_is_refused_and_not_wrong():
    hidden, head, labels = make_case()
    loss = selected_position_loss(hidden, head, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
