"""The vision tower's first layer on images as the workers cut them: patches of one frame.

The stock layer is a convolution over patches that show the frame twice. Both halves see the same numbers, so the sum
of their weights sees them once, in one matrix product of half the size.
"""

import functools

import torch
from torch import nn


def normalised(patches: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """uint8 `(patches, 3 * N)` as fp32; mean and standard deviation of pixels in 0..255."""
    # In place from here: pixels are the largest input, and a broadcast would hold them twice.
    channels = patches.unflatten(1, (3, -1)).float()
    for channel, (shift, scale) in enumerate(zip(mean, std, strict=True)):
        channels[:, channel].sub_(shift).div_(scale)
    return channels.flatten(1)


@functools.cache
def packed_patch_embedding(stock: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a stock patch embedding, under its name, that takes `(patches, 3 * P * P)`, of one frame, too."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[-1] != self.in_channels * self.patch_size**2:
            return stock.forward(self, hidden_states)
        conv = self.proj
        # An adapter, or what else has taken the layer's place, has to be called itself.
        if type(conv) is not nn.Conv3d:
            frames = hidden_states.unflatten(1, (3, 1, -1)).expand(-1, -1, self.temporal_patch_size, -1)
            return stock.forward(self, frames.flatten(1))
        # Summed in fp32: in bf16 the sum would be rounded before the product.
        weight = conv.weight.sum(2, dtype=torch.float32).flatten(1).to(conv.weight.dtype)
        return nn.functional.linear(hidden_states.to(weight.dtype), weight, conv.bias)

    return type(
        stock.__name__,
        (stock,),
        {"forward": forward, "__module__": stock.__module__, "__qualname__": stock.__qualname__},
    )
