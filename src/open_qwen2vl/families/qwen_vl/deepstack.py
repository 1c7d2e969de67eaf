"""Qwen3-VL's deepstack by the positions of the placeholders: the stock mask of them is waited for at each level."""

import functools

import torch
from torch import nn


@functools.cache
def packed_deepstack(stock: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a stock language model, under its name, that takes int64 positions as `visual_pos_masks` too."""

    def _deepstack_process(
        self: nn.Module, hidden_states: torch.Tensor, visual_pos_masks: torch.Tensor, visual_embeds: torch.Tensor
    ) -> torch.Tensor:
        if visual_pos_masks.dtype == torch.bool:
            return stock._deepstack_process(self, hidden_states, visual_pos_masks, visual_embeds)
        rows = hidden_states.flatten(0, 1)
        added = rows.index_add(0, visual_pos_masks.to(rows.device), visual_embeds.to(rows.device, rows.dtype))
        return added.view_as(hidden_states)

    return type(
        stock.__name__,
        (stock,),
        {
            "_deepstack_process": _deepstack_process,
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
        },
    )
