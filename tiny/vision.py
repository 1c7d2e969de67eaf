"""What stands between SigLIP's patches and the language model: the tower cut short, the token budget, the projector.

This file travels with checkpoints: it imports installed libraries and its siblings only.
"""

from typing import Any

import torch
from torch import nn
from transformers import SiglipVisionModel
from transformers.activations import ACT2FN

from .configuration_open_qwen2vl import OpenQwen2VLConfig


class OpenQwen2VLMultiModalProjector(nn.Module):
    """Average-pools a square patch grid to a square token budget, then Linear, GELU, Linear (paper, section 2.1)."""

    def __init__(self, config: OpenQwen2VLConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    @staticmethod
    def pool(image_features: torch.Tensor, image_seq_length: int) -> torch.Tensor:
        """`(images, grid * grid, width)` to `(images, image_seq_length, width)` by adaptive average pooling."""
        images, patches, width = image_features.shape
        if patches == image_seq_length:
            return image_features
        grid, side = int(patches**0.5), int(image_seq_length**0.5)
        features = image_features.transpose(1, 2).reshape(images, width, grid, grid)
        return nn.functional.adaptive_avg_pool2d(features, (side, side)).flatten(2).transpose(1, 2)

    def forward(
        self, image_features: torch.Tensor, image_seq_length: int | list[int]
    ) -> torch.Tensor | list[torch.Tensor]:
        """`(images, grid * grid, vision_hidden)` to `(images, image_seq_length, text_hidden)`.

        With a budget for each image a list of `(image_seq_length, text_hidden)`, computed budget by budget.
        """
        if not isinstance(image_seq_length, int):
            found: dict[int, torch.Tensor] = {}
            for budget in set(image_seq_length):
                images = [image for image, own in enumerate(image_seq_length) if own == budget]
                found |= zip(images, self(image_features[images], budget), strict=True)
            return [found[image] for image in sorted(found)]
        # Pooled or not it is a transposed view, which some kernels of a Linear refuse, as oneDNN's in vLLM.
        pooled = self.pool(image_features, image_seq_length).contiguous()
        return self.linear_2(self.act(self.linear_1(pooled)))


def truncate_vision_tower(vision_tower: SiglipVisionModel, config: OpenQwen2VLConfig) -> SiglipVisionModel:
    """Drop what the features of `config.vision_feature_layer` do not need: later blocks, final norm, pooling head."""
    del vision_tower.encoder.layers[config.num_vision_blocks :]
    vision_tower.post_layernorm = nn.Identity()
    vision_tower.use_head = False
    if hasattr(vision_tower, "head"):
        del vision_tower.head
    return vision_tower


def read_image_seq_length(value: Any, default: int, images: int) -> int | list[int]:
    """The budget of a call, from a number or, per image, a tensor or list of any nesting; None: `default`.

    Budgets that differ are a list, one for each image.
    """
    budgets = _flatten(value)
    if len(set(budgets)) > 1:
        if len(budgets) != images:
            raise ValueError(f"image_seq_length has {len(budgets)} entries for {images} images")
        return budgets
    return budgets[0] if budgets else default


def join_features(features: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """`(tokens of all images, hidden)` of one tensor or of a list by image."""
    return features.flatten(0, 1) if isinstance(features, torch.Tensor) else torch.cat(features)


def _flatten(value: Any) -> list[int]:
    if value is None:
        return []
    if hasattr(value, "tolist"):  # tensors and arrays of batches that are collated: pipelines, TRL's GRPO
        value = value.tolist()
    return [number for part in value for number in _flatten(part)] if isinstance(value, list | tuple) else [value]


def normalize_pixels(pixel_values: torch.Tensor, image_size: int) -> torch.Tensor:
    """uint8 pixels with mean = std = 0.5, floats as they are; `(images, 3, image_size, image_size)` or an error."""
    if tuple(pixel_values.shape[-2:]) != (image_size, image_size):
        raise ValueError(
            f"pixel_values are {tuple(pixel_values.shape)}; the vision tower takes {image_size}x{image_size} images"
        )
    if pixel_values.is_floating_point():
        return pixel_values
    return pixel_values.float().div_(255).sub_(0.5).div_(0.5)
