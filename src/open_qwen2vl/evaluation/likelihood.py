"""How probable given answers are: the context is run once, and its KV cache serves all of its answers."""

import copy
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel


@torch.inference_mode()
def continuation_losses(
    model: PreTrainedModel, inputs: dict, continuations: Sequence[list[int]], batch_size: int
) -> list[tuple[float, bool]]:
    """Losses of several continuations of one context.

    Args:
        model (`PreTrainedModel`): in evaluation mode.
        inputs (`dict`): of one prompt, without padding; `input_ids` of shape `(1, context)`, images where it has them.
        continuations (`Sequence[list[int]]`): token ids.
        batch_size (`int`): continuations that run at a time.

    Returns:
        `list[tuple[float, bool]]`: for each the summed negative log-likelihood in nats (fp32), and whether greedy
        decoding would write it.
    """
    context = model(**inputs, use_cache=True, logits_to_keep=1)
    first = context.logits[:, -1:].float()
    results = []
    for start in range(0, len(continuations), batch_size):
        chunk = continuations[start : start + batch_size]
        results += _chunk_losses(model, context.past_key_values, inputs["input_ids"].shape[1], first, chunk)
    return results


def _chunk_losses(
    model: PreTrainedModel, cache: Cache, context: int, first: torch.Tensor, chunk: Sequence[list[int]]
) -> list[tuple[float, bool]]:
    longest = max([1, *map(len, chunk)])
    device = first.device
    # (continuations, longest), padded on the right, where nothing that counts can see it
    ids = torch.tensor([own + [0] * (longest - len(own)) for own in chunk], device=device)
    real = torch.tensor([[1] * len(own) + [0] * (longest - len(own)) for own in chunk], device=device)
    logits = first.expand(len(chunk), -1, -1)
    if longest > 1:
        shared = copy.deepcopy(cache)
        shared.batch_repeat_interleave(len(chunk))
        mask = torch.cat([real.new_ones(len(chunk), context), real[:, :-1]], dim=1)
        output = model(input_ids=ids[:, :-1], attention_mask=mask, past_key_values=shared, use_cache=True)
        logits = torch.cat([logits, output.logits.float()], dim=1)
    losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * real
    greedy = ((logits.argmax(-1) == ids) | (real == 0)).all(dim=1)
    return list(zip(losses.sum(dim=1).tolist(), greedy.tolist(), strict=True))
