"""What a vision tower has to know of its images, worked out on the host, where their grids are.

The stock tower reads the grids from the device, image by image, and waits for it each time. Here transformers' own
functions compute the same tensors before, and the tower takes them by their names.
"""

from typing import Any

import torch
from torch import nn
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from .vision_attention import Segments


@torch.compiler.disable
def tower_inputs(tower: nn.Module, grids: list[list[int]], device: torch.device) -> dict[str, Any]:
    """Arguments of the tower of any of the three models for grids of `(time, height, width)` in patches."""
    vision, grid_thw = tower.config, torch.tensor(grids, device="cpu")
    merge = vision.spatial_merge_size
    boundaries = get_vision_cu_seqlens(grid_thw)
    segments = [boundaries.diff().tolist()]
    inputs = {"position_ids": get_vision_position_ids(grid_thw, merge), "cu_seqlens": boundaries}
    options = {"max_seqlen": max(segments[0])}
    if hasattr(vision, "fullatt_block_indexes"):  # Qwen2.5-VL
        index, boundaries = get_vision_window_index(grid_thw, merge, vision.window_size, vision.patch_size)
        segments.append(boundaries.diff().tolist())
        inputs |= {"window_index": index, "cu_window_seqlens": boundaries}
        options["max_window_seqlen"] = max(segments[1])
    if hasattr(tower, "num_grid_per_side"):  # Qwen3-VL
        inputs["interp_indices"], inputs["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grid_thw, tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners, merge
        )
    on_device = {name: _to_device(value, device) for name, value in inputs.items()}
    return {"grid_thw": grid_thw, "segments": Segments(*segments), **on_device, **options}


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy without waiting for the device, which pageable memory would."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
