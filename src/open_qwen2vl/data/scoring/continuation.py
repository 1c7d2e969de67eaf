"""Prompts that begin alike: the common part is prefilled once, and each end continues from a copy of its cache.

A batch is a row of blocks, each padded at its left; the mask has the holes. Positions come from the model's own rule
for generation, so that models with other than plain positions (M-RoPE) are continued as they would continue.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

# The cache is repeated for every row of a tree: no more of it than this at once.
BRANCH_CACHE_BYTES = 2**31


class Prompts(NamedTuple):
    """A batch of prompts that the model has read."""

    input_ids: torch.Tensor  # int64 (batch, length), with padding
    attention_mask: torch.Tensor  # int64 (batch, length): 0 at padding, which is never last
    position_ids: torch.Tensor  # (..., batch, length), the model's own
    cache: Cache  # keys and values of all of it
    logits: torch.Tensor  # (batch, vocabulary), after the last token

    def generation_inputs(self, texts: list[list[int]], pad_token_id: int) -> dict:
        """Arguments of `generate` to go on with text that the model has not read yet; the prompts stay as they are."""
        ids, mask = _block(texts, pad_token_id, self.input_ids.device)
        return {
            "input_ids": torch.cat([self.input_ids, ids], 1),
            "attention_mask": torch.cat([self.attention_mask, mask], 1),
            "position_ids": torch.cat([self.position_ids, self.next_positions(mask)], -1),
            "past_key_values": copy.deepcopy(self.cache),
        }

    def next_positions(self, mask: torch.Tensor) -> torch.Tensor:
        """Positions behind, `(..., batch, new)`: one further for each token, whatever the rule for images was."""
        return self.position_ids[..., -1:] + mask.cumsum(-1)


def append_text(inputs: dict, texts: list[list[int]], pad_token_id: int) -> dict:
    """New model inputs with text behind them, padded at the left; its `*token_type_ids` are 0."""
    ids, mask = _block(texts, pad_token_id, inputs["input_ids"].device)
    extended = dict(inputs)
    for name, value in inputs.items():
        if name.endswith("token_type_ids"):
            extended[name] = torch.cat([value, torch.zeros_like(ids)], 1)
    extended["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    extended["attention_mask"] = torch.cat([inputs["attention_mask"], mask], 1)
    return extended


def own_positions(model: PreTrainedModel, inputs: dict) -> torch.Tensor:
    """The positions that `generate` would give these inputs: `(..., batch, length)`."""
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    return model._prepare_position_ids_for_generation(inputs["input_ids"], others)


def prefill(model: PreTrainedModel, inputs: dict) -> Prompts:
    """Let the model read prompts, padded at the left."""
    positions = own_positions(model, inputs)
    output = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    return Prompts(
        inputs["input_ids"], inputs["attention_mask"], positions, output.past_key_values, output.logits[:, -1]
    )


def extend(model: PreTrainedModel, prompts: Prompts, texts: list[list[int]], pad_token_id: int) -> Prompts:
    """Let the model read on; the prompts stay as they are, for another end."""
    inputs = prompts.generation_inputs(texts, pad_token_id)
    new = inputs["input_ids"].shape[1] - prompts.input_ids.shape[1]
    output = model(
        input_ids=inputs["input_ids"][:, -new:],
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"][..., -new:],
        past_key_values=inputs["past_key_values"],
        use_cache=True,
        logits_to_keep=1,
    )
    return Prompts(
        inputs["input_ids"],
        inputs["attention_mask"],
        inputs["position_ids"],
        output.past_key_values,
        output.logits[:, -1],
    )


def branch_logits(model: PreTrainedModel, prompts: Prompts, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits `(some, depth, vocabulary)` after every token of continuations `(rows, depth)`, the same for all prompts.

    In order, all rows of the first prompt first; as many at once as `BRANCH_CACHE_BYTES` allow.
    """
    batch, (count, depth) = len(prompts.input_ids), rows.shape
    rows = rows.to(prompts.input_ids.device)
    further = torch.arange(1, depth + 1, device=rows.device)
    if not count:
        return
    for pairs in torch.arange(batch * count, device=rows.device).split(_rows_at_once(prompts)):
        owner = pairs // count
        cache = copy.deepcopy(prompts.cache)
        cache.batch_select_indices(owner)
        mask = prompts.attention_mask[owner]
        yield model(
            input_ids=rows[pairs % count],
            # What pads a row stands behind all that is read, and nothing looks ahead.
            attention_mask=torch.cat([mask, mask.new_ones(len(pairs), depth)], 1),
            position_ids=prompts.position_ids[..., owner, -1:] + further,
            past_key_values=cache,
            use_cache=True,
        ).logits


def _rows_at_once(prompts: Prompts) -> int:
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in prompts.cache.layers)
    return max(1, BRANCH_CACHE_BYTES * len(prompts.input_ids) // held)


def _block(texts: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `(batch, longest)`, padded at the left."""
    longest = max(map(len, texts))
    ids = torch.tensor([[pad_token_id] * (longest - len(text)) + text for text in texts], device=device)
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts], device=device)
    return ids.long(), mask.long()
