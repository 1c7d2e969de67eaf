"""Cross-entropy from hidden states, without ever holding the full logits.

In pre-training about 85 % of the positions are images and carry no label; of a 4096 x 151,936 logits matrix most rows
would be computed for nothing. Labelled positions are selected first, then projected and scored in chunks, and the
gradients of a chunk are formed while its logits exist, so that the head runs once and no logits are kept for backward.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# Logits of one chunk: 441 rows of fp32 or 883 of bf16 at a vocabulary of 151,936.
CHUNK_BYTES = 2**28
# Rows whose softmax is taken at once on a CPU: what fits into its cache (4.9 MB at that vocabulary).
CACHED_ROWS = 8
# Rows of the head whose bf16 gradient is added to the fp32 sum at once, for the same reason.
HEAD_SLICE = 16_384

IGNORE_INDEX = -100


class _LinearCrossEntropySum(torch.autograd.Function):
    """Cross-entropy(hidden @ weight.T, target): the sum and, detached, each row's; gradients come in the forward.

    `counts`, one for each row, weigh the sum and the gradients, not the rows' losses.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        with_grad: bool,
        counts: torch.Tensor | None,
    ):
        need_hidden, need_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        rows = _chunk_rows(hidden.shape[0], weight)
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # fp32 where chunks are added up, because a bf16 sum over many of them would lose the small ones.
        sum_dtype = weight.dtype if rows >= hidden.shape[0] else torch.float32
        grad_weight = torch.empty_like(weight, dtype=sum_dtype) if need_weight else None
        # One buffer for all chunks: fresh memory costs a page fault per 4 kB, as much time as the softmax itself.
        buffer = hidden.new_empty(rows, weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            here = slice(start, start + rows)
            chunk = hidden[here]
            logits = torch.mm(chunk, weight.t(), out=buffer[: chunk.shape[0]])
            _cross_entropy_(logits, target[here], losses[here], need_hidden or need_weight)
            if counts is not None and (need_hidden or need_weight):
                logits.mul_(counts[here, None].to(logits.dtype))
            if need_hidden:
                torch.mm(logits, weight, out=grad_hidden[here])
            if need_weight:
                _add_head_gradient_(grad_weight, logits, chunk, first=start == 0)
        if need_weight and not hidden.shape[0]:
            grad_weight.zero_()
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype) if need_weight else None)
        ctx.mark_non_differentiable(losses)
        return (losses if counts is None else losses * counts).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor):
        # In place: nobody else holds them, and a second backward through the same graph is refused by torch.
        return *(None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors), None, None, None


def _chunk_rows(total: int, weight: torch.Tensor) -> int:
    """Rows of a chunk: as few chunks as fit into `CHUNK_BYTES` each, all of about the same size."""
    most = max(1, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
    return -(-max(1, total) // -(-max(1, total) // most))


def _cross_entropy_(logits: torch.Tensor, target: torch.Tensor, losses: torch.Tensor, with_grad: bool) -> None:
    """Write each row's loss to `losses` and, with `with_grad`, its gradient (softmax - one-hot) over the logits."""
    rows = min(CACHED_ROWS, logits.shape[0]) if logits.device.type == "cpu" else logits.shape[0]
    buffer = logits.new_empty(rows, logits.shape[1], dtype=torch.float32)
    for start in range(0, logits.shape[0], rows):
        block, block_target = logits[start : start + rows], target[start : start + rows, None]
        scores = torch.log_softmax(block, dim=-1, dtype=torch.float32, out=buffer[: block.shape[0]])
        torch.neg(scores.gather(1, block_target), out=losses[start : start + rows, None])
        if with_grad:
            grad = scores.exp_()
            grad.scatter_add_(1, block_target, grad.new_full(block_target.shape, -1.0))
            block.copy_(grad)


def _add_head_gradient_(
    grad_weight: torch.Tensor, grad_logits: torch.Tensor, chunk: torch.Tensor, first: bool
) -> None:
    """Add `grad_logits.T @ chunk` to `grad_weight`, which holds nothing yet for the first chunk."""
    if grad_weight.dtype == chunk.dtype:
        torch.addmm(grad_weight, grad_logits.t(), chunk, beta=0.0 if first else 1.0, out=grad_weight)
        return
    for start in range(0, grad_weight.shape[0], HEAD_SLICE):
        here = slice(start, start + HEAD_SLICE)
        part = grad_logits[:, here].t() @ chunk
        grad_weight[here].copy_(part) if first else grad_weight[here].add_(part)


# Its shapes change with the number of labels, and it is three large products that a compiler cannot make faster.
@torch.compiler.disable
def selected_position_loss(
    hidden_states: torch.Tensor,
    lm_head: nn.Linear,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    return_row_losses: bool = False,
    label_positions: torch.Tensor | None = None,
    shifted: bool = False,
    loss_weights: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Next-token cross-entropy computed at the labelled positions only.

    Equal to transformers' `ForCausalLMLoss` over the full logits, value and gradients.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden)`): the language model's last hidden states.
        lm_head (`nn.Linear`): the output projection, without bias.
        labels (`torch.LongTensor` of shape `(batch, sequence)`): token ids, -100 where nothing is to be predicted.
            They are shifted here: position t is scored against label t + 1.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): divisor of the summed loss, the number of labels in
            all batches of an optimizer step; defaults to the number of labels here.
        return_row_losses (`bool`, *optional*, defaults to `False`): also return what each row adds to the loss.
        label_positions (`torch.LongTensor` of shape `(labelled,)`, *optional*): positions t, in the flattened batch,
            whose label t + 1 is to be predicted, as the collator gives them; looked for where not given, for which
            the host waits for the device.
        shifted (`bool`, *optional*, defaults to `False`): position t is scored against label t, as `shift_labels` are.
        loss_weights (`torch.FloatTensor` of shape `(batch,)`, *optional*): what a label of each row counts in the sum;
            the divisor stays the number of labels.

    Returns:
        `torch.Tensor`: fp32 scalar; 0 with a graph to every parameter where no position is labelled. With
        `return_row_losses` a tuple of it and the detached fp32 sums, undivided and unweighted, of each row's losses,
        `(batch,)`.
    """
    labels = labels.to(hidden_states.device)
    if label_positions is None:
        targets = labels if shifted else nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        label_positions = torch.nonzero(targets.flatten() != IGNORE_INDEX).squeeze(1)
    hidden = hidden_states.flatten(0, 1).index_select(0, label_positions)
    # The last position of a row is never among them, so its neighbour is of the same row.
    targets = labels.flatten().index_select(0, label_positions if shifted else label_positions + 1)
    weight = lm_head.weight
    if isinstance(weight, DTensor):
        # Tensor parallelism shards the head; its own forward would gather the logits, here the weight is.
        weight = weight.full_tensor()
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    rows = label_positions // labels.shape[1]
    counts = None if loss_weights is None else loss_weights.to(hidden.device, torch.float32)[rows]
    loss, losses = _LinearCrossEntropySum.apply(hidden, weight, targets, torch.is_grad_enabled(), counts)
    items = targets.numel() if num_items_in_batch is None else num_items_in_batch
    # At least 1: a batch without labels has the sum 0, and 0 / 0 would poison every weight.
    loss = loss / (items.to(loss.device).clamp(min=1) if isinstance(items, torch.Tensor) else max(items, 1))
    if not return_row_losses:
        return loss
    return loss, losses.new_zeros(len(labels)).index_add_(0, rows, losses)
