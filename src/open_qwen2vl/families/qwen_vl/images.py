"""From an image file to the patches that the vision tower takes: uint8 and one frame, an eighth of the stock bytes.

The model normalises on its device and shows each image as two frames. After that the values are those of
transformers' `Qwen2VLImageProcessor` (torchvision backend) to the last bit: the same integer kernel resizes. The
Pillow backend's differ from both by a few grey levels of 256.
"""

import numpy as np
import torch
from torch import nn

from .sizes import ImageSizes


def image_patches(pixels: np.ndarray, sizes: ImageSizes, mode: str = "bicubic") -> torch.Tensor:
    """An upright RGB image, uint8 `(height, width, 3)`, as uint8 patches `(rows * columns, 3 * P * P)`.

    Those of a token lie together.
    """
    height, width = pixels.shape[:2]
    resized = resized_pixels(pixels, sizes.resized(width, height), mode)
    return torch.from_numpy(patchify(resized, sizes.patch_size, sizes.merge_size))


def resized_pixels(pixels: np.ndarray, size: tuple[int, int], mode: str = "bicubic") -> np.ndarray:
    """uint8 `(height, width, 3)` as `(3, *size)`."""
    # (height, width, 3) -> (1, 3, height, width), which torch takes for its fast, channels-last kernel
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if pixels.shape[:2] != tuple(size):
        tensor = nn.functional.interpolate(tensor, size, mode=mode, antialias=True)
    return tensor[0].contiguous().numpy()


def patchify(pixels: np.ndarray, patch_size: int, merge_size: int) -> np.ndarray:
    """`(C, height, width)` to `(patches, C * P * P)`: merge blocks row by row, in each its patches row by row."""
    channels, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    # A line of a patch is one element: byte by byte the copy takes two to three times as long.
    lines = pixels.view(np.dtype((np.void, patch_size)))
    lines = lines.reshape(channels, rows // merge_size, merge_size, patch_size, columns // merge_size, merge_size)
    # (3, R, m, P, C, m) -> (R, C, m, m, 3, P)
    return np.ascontiguousarray(lines.transpose(1, 4, 2, 5, 0, 3)).view(np.uint8).reshape(rows * columns, -1)
