"""What stands between a tower's patches and the language model: the tower cut short, the token budget, the projector.

This file travels with checkpoints: it imports installed libraries and its siblings only.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_open_qwen2vl import OpenQwen2VLConfig, one_side


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


def truncate_vision_tower(vision_tower: PreTrainedModel, config: OpenQwen2VLConfig) -> PreTrainedModel:
    """Drop what the features of `config.vision_feature_layer` do not need: later blocks, final norm, pooling head."""
    del vision_blocks(vision_tower)[config.num_vision_blocks :]
    for norm in ("post_layernorm", "layernorm", "norm"):  # SigLIP's and CLIP's, DINOv2's, DINOv3's
        if hasattr(vision_tower, norm):
            setattr(vision_tower, norm, nn.Identity())
    vision_tower.use_head = False
    if hasattr(vision_tower, "head"):
        del vision_tower.head
    if getattr(vision_tower.embeddings, "mask_token", None) is not None:
        # Of DINO's pre-training: nothing is masked here, and a parameter without a gradient would stop DDP.
        empty = torch.zeros_like(vision_tower.embeddings.mask_token)
        del vision_tower.embeddings.mask_token
        vision_tower.embeddings.register_buffer("mask_token", empty, persistent=False)
    for augmentation in ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"):
        # DINOv3's, which would move and scale the positions of every training step by chance.
        if getattr(vision_tower.config, augmentation, None) is not None:
            setattr(vision_tower.config, augmentation, None)
    return vision_tower


def vision_blocks(vision_tower: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a tower, its only list of modules."""
    return next(module for module in vision_tower.modules() if isinstance(module, nn.ModuleList))


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


def normalize_pixels(pixel_values: torch.Tensor, config: OpenQwen2VLConfig) -> torch.Tensor:
    """uint8 pixels with the tower's mean and deviation, floats as they are; of another shape a `ValueError`.

    `(images, 3, side, side)`, or `(images, patches, P * P * 3)` of a tower of native resolution.
    """
    patch = one_side(config.vision_config.patch_size)
    side = None if config.native_resolution else one_side(config.vision_config.image_size)
    if side and tuple(pixel_values.shape[-2:]) != (side, side):
        raise ValueError(f"pixel_values are {tuple(pixel_values.shape)}; the vision tower takes {side}x{side} images")
    if not side and (pixel_values.ndim != 3 or pixel_values.shape[2] != 3 * patch**2):
        raise ValueError(f"pixel_values are {tuple(pixel_values.shape)}; the tower takes {patch}x{patch} patches")
    if pixel_values.is_floating_point():
        return pixel_values
    pixels = pixel_values.float().div_(255)
    channels = pixels.unbind(1) if side else pixels.unflatten(2, (-1, 3)).unbind(3)
    for channel, mean, std in zip(channels, config.image_mean, config.image_std, strict=True):
        channel.sub_(mean).div_(std)  # numbers: a GPU would wait for tensors of them
    return pixels


def read_image_shapes(image_shapes: Any, pixel_values: torch.Tensor) -> list[list[int]]:
    """Of each image of native resolution its patches, high and wide, and its tokens, likewise; or a ValueError."""
    shapes = image_shapes.tolist() if hasattr(image_shapes, "tolist") else image_shapes
    images, most = pixel_values.shape[:2]
    if shapes is None or len(shapes) != images:
        raise ValueError(f"{images} images of native resolution need as many image_shapes: the processor gives them")
    for shape in shapes:
        height, width, rows, columns = shape
        if height * width > most or not (1 <= rows <= height and 1 <= columns <= width):
            raise ValueError(f"image_shapes {shape} do not fit an image of {most} patches")
    return shapes


def tower_shapes(shapes: list[list[int]], pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of SigLIP 2's forward: which patches are there, and how they lie; the latter for the host."""
    counts = torch.tensor([height * width for height, width, *_ in shapes])
    is_there = torch.arange(pixel_values.shape[1]) < counts[:, None]
    sizes = torch.tensor([shape[:2] for shape in shapes])
    return {"pixel_attention_mask": is_there.to(pixel_values.device), "spatial_shapes": sizes}


def pool_shapes(features: torch.Tensor, shapes: list[list[int]]) -> list[torch.Tensor]:
    """`(images, patches, width)`, padded, to `(tokens, width)` for each image by adaptive average pooling."""
    pooled = []
    for image, (height, width, *grid) in zip(features, shapes, strict=True):
        patches = image[: height * width]
        if grid != [height, width]:
            patches = patches.T.unflatten(1, (height, width))
            patches = nn.functional.adaptive_avg_pool2d(patches, grid).flatten(1).T
        pooled.append(patches)
    return pooled


def encode_images(
    model: Any, pixel_values: torch.Tensor, image_seq_length: Any, image_shapes: Any = None, **kwargs
) -> tuple[BaseModelOutputWithPooling, torch.Tensor | list[torch.Tensor]]:
    """Output of a model's tower, and features `(images, image_seq_length, text_hidden)` in one tensor.

    A list of them would make a compiler start anew for every number of images; only where budgets differ, or shapes
    are the images' own, it is one, of `(tokens, text_hidden)` for each image.
    """
    config, shapes = model.config, []
    if config.native_resolution:
        shapes = read_image_shapes(image_shapes, pixel_values)
        kwargs |= tower_shapes(shapes, pixel_values)
    elif image_shapes is not None:
        raise ValueError("image_shapes are for a vision tower of native resolution; this one takes squares")
    budgets = read_image_seq_length(image_seq_length, config.image_seq_length, len(pixel_values))
    for budget in {budgets} if isinstance(budgets, int) else set(budgets):
        config.check_budget(budget)
    pixel_values = normalize_pixels(pixel_values, config)
    trained = any(parameter.requires_grad for parameter in model.vision_tower.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
        outputs = model.vision_tower(pixel_values, return_dict=True, **kwargs)
    if shapes:
        tokens = pool_shapes(outputs.last_hidden_state, shapes)
        counts = [*map(len, tokens)]
        return outputs, list(model.multi_modal_projector(torch.cat(tokens)[None], sum(counts))[0].split(counts))
    # Class token and registers stand before the patches.
    patches = outputs.last_hidden_state[:, -(config.patches_per_side**2) :]
    return outputs, model.multi_modal_projector(patches, budgets)


def blank_image(config: OpenQwen2VLConfig, device: torch.device) -> tuple[torch.Tensor, list[list[int]] | None]:
    """Pixels of one black image, of native resolution a single patch, and its shape there."""
    vision = config.vision_config
    if config.native_resolution:
        size, shapes = (1, 3 * one_side(vision.patch_size) ** 2), [[1, 1, 1, 1]]
    else:
        size, shapes = (3, one_side(vision.image_size), one_side(vision.image_size)), None
    return torch.zeros((1, *size), dtype=torch.uint8, device=device), shapes
