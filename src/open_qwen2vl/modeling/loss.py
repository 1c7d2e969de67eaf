"""Cross-entropy from hidden states, without ever holding the full logits.

In pre-training about 85 % of the positions are images and carry no label; of a 4096 x 151,936 logits matrix most rows
would be computed for nothing. Labelled positions are selected first, then projected and scored in chunks, and the
gradients of a chunk are formed while its logits exist, so that the head runs once and no logits are kept for backward.
"""

import torch
from torch import nn

# Logits of one chunk: 2**26 fp32 values are 256 MB, 441 rows at a vocabulary of 151,936.
CHUNK_LOGITS = 2**26


class _LinearCrossEntropySum(torch.autograd.Function):
    """Sum over rows of cross-entropy(hidden @ weight.T, target); gradients are computed in the forward."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, with_grad: bool):
        need_hidden, need_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # fp32, because a bf16 sum over many chunks would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        rows = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk, chunk_target = hidden[start : start + rows], target[start : start + rows, None]
            logits = (chunk @ weight.t()).float()
            log_norm = logits.logsumexp(dim=-1, keepdim=True)
            loss += (log_norm - logits.gather(1, chunk_target)).sum()
            if need_hidden or need_weight:
                # d(loss)/d(logits) = softmax - one-hot, written over the logits.
                grad_logits = logits.sub_(log_norm).exp_()
                grad_logits.scatter_add_(1, chunk_target, torch.full_like(log_norm, -1.0))
                grad_logits = grad_logits.to(chunk.dtype)
            if need_hidden:
                grad_hidden[start : start + rows] = grad_logits @ weight
            if need_weight:
                grad_weight += grad_logits.t() @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype) if need_weight else None)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor):
        grads = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, None, None


def selected_position_loss(
    hidden_states: torch.Tensor,
    lm_head: nn.Linear,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Next-token cross-entropy computed at the labelled positions only.

    Equal to transformers' `ForCausalLMLoss` over the full logits, value and gradients.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden)`): the language model's last hidden states.
        lm_head (`nn.Linear`): the output projection, without bias.
        labels (`torch.LongTensor` of shape `(batch, sequence)`): token ids, -100 where nothing is to be predicted.
            They are shifted here: position t is scored against label t + 1.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): divisor of the summed loss, the number of labels in
            all batches of an optimizer step; defaults to the number of labels here.

    Returns:
        `torch.Tensor`: fp32 scalar; 0 with a graph to every parameter where no position is labelled.
    """
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).to(hidden_states.device)
    selected = targets != -100
    hidden, targets = hidden_states[selected], targets[selected]
    weight = lm_head.weight
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    loss = _LinearCrossEntropySum.apply(hidden, weight, targets, torch.is_grad_enabled())
    items = targets.numel() if num_items_in_batch is None else num_items_in_batch
    # At least 1: a batch without labels has the sum 0, and 0 / 0 would poison every weight.
    return loss / (items.to(loss.device).clamp(min=1) if isinstance(items, torch.Tensor) else max(items, 1))
