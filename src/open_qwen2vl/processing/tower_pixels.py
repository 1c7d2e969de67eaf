"""What pixels a vision tower takes: one square, or, of SigLIP 2 NaFlex, the patches of an image in its own shape.

This file travels with checkpoints: it imports installed libraries and its siblings only.
"""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    convert_image_to_patches,
    get_image_size_for_max_num_patches,
)


def on_pillow(image_processor: Any) -> SiglipImageProcessorPil | Siglip2ImageProcessorPil:
    """An image processor on Pillow's backend; the Auto classes prefer torchvision's, also for what Pillow's saved."""
    kind = Siglip2ImageProcessorPil if is_native(image_processor) else SiglipImageProcessorPil
    return image_processor if isinstance(image_processor, kind) else kind.from_dict(image_processor.to_dict())


def is_native(image_processor: Any) -> bool:
    """Whether images keep their shape."""
    return hasattr(image_processor, "max_num_patches")


def tower_image_processor(vision: str, **kwargs: Any) -> tuple[Any, int | None]:
    """The image processor of a vision tower, and the side of its grid of patches; None of native resolution.

    Of squares it is SigLIP's, with size, mean, deviation and filter of the tower. What others crop off (CLIP, DINOv2)
    is kept: an image is warped. The side is the config's, for which the tower's positions are, also where its own
    processor makes images smaller (DINOv2: 518, and 224).
    """
    config = AutoConfig.from_pretrained(vision, **kwargs)
    config = getattr(config, "vision_config", config)
    own = AutoImageProcessor.from_pretrained(vision, **kwargs)
    if is_native(own):
        return on_pillow(own), None
    if not hasattr(config, "image_size"):
        raise ValueError(f"{vision}: {config.model_type!r} has no size of images, and cannot be the vision tower")
    side, patch = (max(s) if isinstance(s, list | tuple) else s for s in (config.image_size, config.patch_size))
    values = {name: getattr(own, name) for name in ("resample", "image_mean", "image_std")}
    return SiglipImageProcessorPil(size={"height": side, "width": side}, **values), side // patch


def image_shape(image_processor: Siglip2ImageProcessorPil, height: int, width: int, most: int) -> list[int]:
    """Patches, high and wide, of an image of so many pixels, and its tokens, likewise: `most` of them together.

    As many patches as the image processor allows; tokens keep the shape as nearly as whole numbers do.
    """
    patch = image_processor.patch_size
    size = get_image_size_for_max_num_patches(height, width, patch, image_processor.max_num_patches)
    high, wide = (side // patch for side in size)
    if high * wide <= most:
        return [high, wide, high, wide]
    rows = max(1, math.isqrt(most * high // wide))
    columns = max(1, math.isqrt(most * wide // high))
    # Of a very long image the shorter side is one token, and the longer one would be too many.
    return [high, wide, min(rows, most), min(columns, most)]


def read_patches(image_processor: Siglip2ImageProcessorPil, pixels: np.ndarray, shape: list[int]) -> torch.Tensor:
    """Pixels uint8 `(height, width, 3)` to patches uint8 `(1, max_num_patches, P * P * 3)`, black behind the last."""
    patch, (high, wide) = image_processor.patch_size, shape[:2]
    resized = Image.fromarray(pixels).resize((wide * patch, high * patch), Image.Resampling(image_processor.resample))
    patches = np.zeros((1, image_processor.max_num_patches, 3 * patch**2), dtype=np.uint8)
    patches[0, : high * wide] = convert_image_to_patches(np.asarray(resized).transpose(2, 0, 1), patch)
    return torch.from_numpy(patches)
