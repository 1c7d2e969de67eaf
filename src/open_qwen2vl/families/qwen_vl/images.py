"""From an image file to the patches that the vision tower takes: uint8 and one frame, an eighth of the stock bytes.

The model normalises on its device and shows each image as two frames. After that the values are those of
transformers' `Qwen2VLImageProcessor` (torchvision backend) to the last bit: the same integer kernel resizes. The
Pillow backend's differ from both by a few grey levels of 256.
"""

import numpy as np
import torch
from PIL import Image
from torch import nn

from .sizes import ImageSizes


def image_patches(image: Image.Image, sizes: ImageSizes, mode: str = "bicubic") -> torch.Tensor:
    """An upright RGB image as uint8 patches `(rows * columns, 3 * P * P)`, those of a token together."""
    height, width = sizes.resized(image.width, image.height)
    pixels = np.array(image)
    if (image.height, image.width) != (height, width):
        # (height, width, 3) -> (1, 3, height, width), which torch takes for its fast, channels-last kernel
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        batch = nn.functional.interpolate(batch, (height, width), mode=mode, antialias=True)
        pixels = batch[0].permute(1, 2, 0).numpy()
    return torch.from_numpy(patchify(pixels, sizes.patch_size, sizes.merge_size))


def patchify(pixels: np.ndarray, patch_size: int, merge_size: int) -> np.ndarray:
    """`(height, width, 3)` to `(patches, 3 * P * P)`: merge blocks row by row, in each its patches row by row."""
    height, width, channels = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    # In two copies, of lines and then of patches: one copy would read three bytes at a time, at half the speed.
    patches = np.ascontiguousarray(
        pixels.reshape(rows, patch_size, columns, patch_size * channels).transpose(0, 2, 1, 3)
    )
    blocks = patches.reshape(rows // merge_size, merge_size, columns // merge_size, merge_size, -1, channels)
    # (R, m, C, m, P * P, 3) -> (R, C, m, m, 3, P * P)
    return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3, 5, 4)).reshape(rows * columns, -1)
