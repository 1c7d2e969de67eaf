"""How probable given answers are: the context is run once, and its KV cache serves all of its answers."""

import copy
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data.scoring.continuation import Prompts, prefill


@torch.inference_mode()
def continuation_losses(
    model: PreTrainedModel, inputs: dict, continuations: Sequence[list[int]], batch_size: int
) -> list[tuple[float, bool]]:
    """Losses of several continuations of one context, `batch_size` at a time.

    `inputs` are those of one prompt without padding; returned is for each continuation the summed negative
    log-likelihood in nats (fp32), and whether greedy decoding would write it.
    """
    context = prefill(model, dict(inputs))
    results = []
    for start in range(0, len(continuations), batch_size):
        results += _chunk_losses(model, context, continuations[start : start + batch_size])
    return results


def _chunk_losses(model: PreTrainedModel, context: Prompts, chunk: Sequence[list[int]]) -> list[tuple[float, bool]]:
    longest = max([1, *map(len, chunk)])
    device = context.logits.device
    # (continuations, longest), padded on the right, where nothing that counts can see it
    ids = torch.tensor([own + [0] * (longest - len(own)) for own in chunk], device=device)
    real = torch.tensor([[1] * len(own) + [0] * (longest - len(own)) for own in chunk], device=device)
    logits = context.logits[:, None].float().expand(len(chunk), -1, -1)
    if longest > 1:
        shared = copy.deepcopy(context.cache)
        shared.batch_repeat_interleave(len(chunk))
        before = real.new_ones(len(chunk), context.input_ids.shape[1])
        further = torch.arange(1, longest, device=device)
        output = model(
            input_ids=ids[:, :-1],
            attention_mask=torch.cat([before, real[:, :-1]], dim=1),
            position_ids=(context.position_ids[..., -1:] + further).expand(
                *context.position_ids.shape[:-2], len(chunk), -1
            ),
            past_key_values=shared,
            use_cache=True,
        )
        logits = torch.cat([logits, output.logits.float()], dim=1)
    losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * real
    greedy = ((logits.argmax(-1) == ids) | (real == 0)).all(dim=1)
    return list(zip(losses.sum(dim=1).tolist(), greedy.tolist(), strict=True))
