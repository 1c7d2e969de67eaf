"""Bytes that a forward pass keeps for its backward pass: counted on fake tensors, which have shapes and no memory.

One and two blocks run, what autograd would keep of them is added up, and the difference is a block. Nothing is
loaded, nothing is guessed.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

# Makes a model of so many blocks and the call of its forward on so many positions or images.
Run = Callable[[int, int], tuple[nn.Module, Callable[[], object]]]


@dataclass(frozen=True)
class Kept:
    """What autograd keeps of a stack of equal blocks."""

    block: float  # bytes of a block for each position, patch or image
    rest: float  # bytes outside of the blocks, likewise
    copies: float  # bytes of a block's weights in the type that it computes in, whatever the batch
    entrance: float  # bytes that enter a block, for each position, patch or image
    blocks: int

    def bytes(self, units: int, checkpoint_every: int = 0) -> float:
        """Bytes kept of a batch, with one block more, that of the backward pass; every n-th block is recomputed.

        Copies are those of all blocks: autocast holds them until the end of the forward pass.
        """
        again = math.ceil(self.blocks / checkpoint_every) if checkpoint_every else 0
        whole = self.blocks - again + 1
        return units * (whole * self.block + again * self.entrance + self.rest) + self.blocks * self.copies


def kept_by_blocks(run: Run, units: int, blocks: int, entrance: float, autocast: bool) -> Kept:
    """From one block and two, of one size of batch and twice that."""
    with FakeTensorMode(), no_init_weights():
        one, two, one_twice, two_twice = (
            saved_bytes(*run(number, size), autocast) for size in (units, 2 * units) for number in (1, 2)
        )
    # What does not grow with the blocks cancels within the brackets, what does not with the batch between.
    block = ((two_twice - one_twice) - (two - one)) / units
    return Kept(
        block=block,
        rest=(one_twice - one) / units - block,
        copies=two - one - block * units,
        entrance=entrance,
        blocks=blocks,
    )


def saved_bytes(model: nn.Module, run: Callable[[], object], autocast: bool) -> int:
    """Bytes of all storages that autograd keeps of `run()` but the model's own parameters."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # By storage: autograd keeps views of one tensor once.
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    model.train()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def once_per_config(count: Callable[..., Any]) -> Callable[..., Any]:
    """Remember what a counter found, which runs models: its arguments are a config and what else it depends on."""
    known: dict[tuple, Any] = {}

    @functools.wraps(count)
    def remembered(config: PreTrainedConfig, *others: Any) -> Any:
        key = config.to_json_string(), *others
        if key not in known:
            known[key] = count(config, *others)
        return known[key]

    return remembered
