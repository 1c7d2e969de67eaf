"""Activations of Open-Qwen2VL, by the counters of `activations.py`."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, PreTrainedConfig

from ..modeling.configuration_open_qwen2vl import one_side
from ..modeling.vision import OpenQwen2VLMultiModalProjector, truncate_vision_tower
from .activations import Kept, kept_by_blocks, once_per_config, saved_bytes


@once_per_config
def language_model_kept(config: PreTrainedConfig, trained: bool, dtype: torch.dtype, autocast: bool) -> Kept:
    """What is kept of the language model, for each position."""

    def run(blocks: int, positions: int) -> tuple[nn.Module, Callable[[], object]]:
        text = copy.deepcopy(config.text_config)
        text.num_hidden_layers = blocks
        # No mask that grows with the positions, as for packed documents; Llama takes none by kinds of layers.
        mask = torch.ones((1, 1, 1, 1), dtype=torch.bool)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:blocks]
            mask = dict.fromkeys(text.layer_types)
        model = AutoModel.from_config(text, attn_implementation="sdpa", dtype=dtype).requires_grad_(trained)
        embeds = torch.empty(1, positions, text.hidden_size, dtype=dtype, requires_grad=True)
        return model, lambda: model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)

    entrance = config.text_config.hidden_size * dtype.itemsize
    return kept_by_blocks(run, 64, config.text_config.num_hidden_layers, entrance, autocast)


@once_per_config
def vision_tower_kept(config: PreTrainedConfig, dtype: torch.dtype, autocast: bool) -> Kept:
    """What is kept of a vision tower that trains, for each image."""

    def run(blocks: int, images: int) -> tuple[nn.Module, Callable[[], object]]:
        own = copy.deepcopy(config)
        own.vision_config.num_hidden_layers, own.vision_feature_layer = blocks, -1
        model = AutoModel.from_config(own.vision_config, attn_implementation="sdpa", dtype=dtype)
        model = truncate_vision_tower(model, own)
        if config.native_resolution:
            pixels = torch.empty(images, own.tower_length, 3 * own.vision_config.patch_size**2, dtype=dtype)
            # Positions are laid out by values, which these tensors have not.
            model.embeddings.forward = lambda pixels, shapes: model.embeddings.patch_embedding(pixels)
            return model, lambda: model(pixels, None, None)
        side = one_side(own.vision_config.image_size)
        if hasattr(model, "rope_embeddings"):
            # DINOv3's keeps its table for the next one who asks, which may be a model with contents.
            angles = torch.empty(own.patches_per_side**2, model.rope_embeddings.head_dim, dtype=dtype)
            model.rope_embeddings.forward = lambda pixels: (angles, angles)
        pixels = torch.empty(images, 3, side, side, dtype=dtype)
        return model, lambda: model(pixels)

    entrance = config.tower_length * config.vision_config.hidden_size * dtype.itemsize
    return kept_by_blocks(run, 1, config.num_vision_blocks, entrance, autocast)


@once_per_config
def projector_bytes(config: PreTrainedConfig, image_seq_length: int, dtype: torch.dtype, autocast: bool) -> float:
    """Bytes that the projector keeps of an image."""

    def saved(images: int) -> int:
        projector = OpenQwen2VLMultiModalProjector(config)
        features = torch.empty(images, config.patches_per_side**2, config.vision_config.hidden_size)
        return saved_bytes(projector, lambda: projector(features, image_seq_length), autocast)

    with FakeTensorMode():
        # The projector is made in fp32, whatever the model's type.
        return (saved(2) - saved(1)) * dtype.itemsize / 4
