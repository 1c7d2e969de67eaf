"""Activations of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, by the counters of `activations.py`."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from ..activations import Kept, kept_by_blocks, once_per_config
from .patch_embedding import packed_patch_embedding
from .vision_attention import Segments, packed_vision_attention


@once_per_config
def language_model_kept(config: PreTrainedConfig, trained: bool, dtype: torch.dtype, autocast: bool) -> Kept:
    """What is kept of the language model, for each position."""

    def run(blocks: int, positions: int) -> tuple[nn.Module, Callable[[], object]]:
        text = copy.deepcopy(config.text_config)
        text.num_hidden_layers = blocks
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:blocks]
        model = AutoModel.from_config(text, attn_implementation="sdpa", dtype=dtype).requires_grad_(trained)
        embeds = torch.empty(1, positions, text.hidden_size, dtype=dtype, requires_grad=True)
        rows = torch.empty(3, 1, positions, dtype=torch.int64)
        # Three rows and no mask: the causal kernel, as packed documents run through one without a mask.
        return model, lambda: model(inputs_embeds=embeds, position_ids=rows, use_cache=False)

    entrance = config.text_config.hidden_size * dtype.itemsize
    return kept_by_blocks(run, 64, config.text_config.num_hidden_layers, entrance, autocast)


@once_per_config
def vision_tower_kept(config: PreTrainedConfig, dtype: torch.dtype, autocast: bool) -> Kept:
    """What is kept of a vision tower that trains, for each patch; the pixels are `rest`."""
    vision = config.vision_config
    width = getattr(vision, "embed_dim", None) or vision.hidden_size

    def run(blocks: int, patches: int) -> tuple[nn.Module, Callable[[], object]]:
        tower = _tower(config, blocks, dtype)
        pixels = torch.empty(patches, 3 * vision.patch_size**2, dtype=dtype)
        boundaries = torch.empty(2, dtype=torch.int32)
        angles = torch.empty(patches, width // vision.num_heads)
        options = {"position_embeddings": (angles, angles), "segments": Segments([patches])}

        def forward() -> torch.Tensor:
            hidden = tower.patch_embed(pixels)
            for block in tower.blocks:
                hidden = block(hidden, cu_seqlens=boundaries, **options)
            return hidden

        return tower, forward

    return kept_by_blocks(run, 64, vision.depth, width * dtype.itemsize, autocast)


@once_per_config
def projector_kept(config: PreTrainedConfig, dtype: torch.dtype, autocast: bool) -> Kept:
    """What is kept of the mergers, for each patch."""
    vision = config.vision_config
    width = getattr(vision, "embed_dim", None) or vision.hidden_size

    def run(_: int, patches: int) -> tuple[nn.Module, Callable[[], object]]:
        tower = _tower(config, 1, dtype)
        hidden = torch.empty(patches, width, dtype=dtype)
        mergers = nn.ModuleList([tower.merger, *getattr(tower, "deepstack_merger_list", [])])
        return mergers, lambda: [merger(hidden.clone()) for merger in mergers]

    return kept_by_blocks(run, 64, 0, 0.0, autocast)


def _tower(config: PreTrainedConfig, blocks: int, dtype: torch.dtype) -> nn.Module:
    """Of so many blocks, from a whole model: Qwen2-VL's alone has no Auto class."""
    config = copy.deepcopy(config)
    config.vision_config.depth = blocks
    tower = AutoModel.from_config(config, attn_implementation="sdpa", dtype=dtype).visual
    for block in tower.blocks:
        block.attn.__class__ = packed_vision_attention(type(block.attn))
    tower.patch_embed.__class__ = packed_patch_embedding(type(tower.patch_embed))
    return tower
