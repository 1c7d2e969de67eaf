"""Attention of the vision towers in packed batches: one segment an image (or a window of Qwen2.5-VL), no mask.

The stock code calls its attention once a segment and waits for the device in every block. Here a GPU in half
precision runs `torch.nn.attention.varlen` once a block; elsewhere segments of equal length run together.
"""

import functools
import sys
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from ...modeling.attention import runs_varlen


class Segments:
    """Lengths of the segments of one forward, known on the host: those of whole images, and those of windows."""

    def __init__(self, *kinds: list[int]):
        # A block has the boundaries of one kind: their number tells which without a look at the device.
        self._kinds = {len(lengths): lengths for lengths in kinds}

    def lengths(self, boundaries: torch.Tensor) -> list[int]:
        """Of `(segments + 1,)` boundaries."""
        return self._kinds[len(boundaries) - 1]


@functools.cache
def packed_vision_attention(stock: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a stock vision attention, under its name, that takes `segments`."""
    rotate = sys.modules[stock.__module__].apply_rotary_pos_emb_vision

    def forward(
        self: nn.Module,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        max_seqlen: int | None = None,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if segments is None:
            return stock.forward(self, hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs)
        # (patches, 3 * width) -> three of (patches, heads, head_dim)
        query, key, value = self.qkv(hidden_states).view(len(hidden_states), 3, self.num_heads, -1).unbind(1)
        query, key = rotate(query, key, *position_embeddings)
        attended = segment_attention(query, key, value, cu_seqlens, max_seqlen, segments, self.scaling)
        return self.proj(attended.flatten(1))

    return type(
        stock.__name__,
        (stock,),
        {"forward": forward, "packed": True, "__module__": stock.__module__, "__qualname__": stock.__qualname__},
    )


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    segments: Segments,
    scaling: float,
) -> torch.Tensor:
    """Full attention within each segment of `(patches, heads, head_dim)` states."""
    if runs_varlen(query.device, query.dtype):
        options = {} if scaling == query.shape[-1] ** -0.5 else {"scale": scaling}
        return varlen_attn(query, key, value, boundaries, boundaries, longest, longest, **options)
    return _by_length(query, key, value, boundaries, segments, scaling)


# Out of compiled graphs: the lengths of one batch would be compiled into them.
@torch.compiler.disable
def _by_length(query, key, value, boundaries: torch.Tensor, segments: Segments, scaling: float) -> torch.Tensor:
    lengths = segments.lengths(boundaries)
    # Images of one size, or a single one: a view, nothing is copied.
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0])
        return _attend(*(states.unflatten(0, shape) for states in (query, key, value)), scaling).flatten(0, 1)
    starts: dict[int, list[int]] = defaultdict(list)
    position = 0
    for length in lengths:
        starts[length].append(position)
        position += length
    outputs, order = [], []
    for length, own in starts.items():
        # (segments, length): the rows of the segments of this length
        rows = (torch.tensor(own)[:, None] + torch.arange(length)).to(query.device)
        q, k, v = (states.index_select(0, rows.flatten()).unflatten(0, rows.shape) for states in (query, key, value))
        outputs.append(_attend(q, k, v, scaling).flatten(0, 1))
        order.append(rows.flatten())
    # Back into the order of the patches.
    return torch.cat(outputs).index_select(0, torch.argsort(torch.cat(order)))


def _attend(query, key, value, scaling: float) -> torch.Tensor:
    """`(segments, length, heads, head_dim)` in and out."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2)
