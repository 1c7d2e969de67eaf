"""`ema_decay`: an exponential moving average of the weights that train, beside them in fp32.

    step ─► update ─► average ─► evaluations, the final model, `checkpoint-N/ema`

It is put into the model for those, and the weights are put back bit for bit: the training goes on as without it. Under
FSDP2 each rank averages its shards.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The average, or where `decay` is None one that is never there."""

    def __init__(self, decay: float | None):
        self.decay = decay
        self._average: list[torch.Tensor] = []

    def start(self, model: nn.Module) -> None:
        """Begin with the weights as they are, under FSDP2 in shards."""
        self._average = [weights.clone() for weights in _trained(model)]

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` steps; it begins with those after the first."""
        if self.decay is None:
            return
        if not self._average:
            self.start(model)
        # Short at first, as TensorFlow's: else the beginning would weigh for 1 / (1 - decay) steps.
        decay = min(self.decay, step / (step + 9))
        get_ema_multi_avg_fn(decay)(self._average, _trained(model), None)

    @contextlib.contextmanager
    def in_model(self, model: nn.Module) -> Iterator[None]:
        """The average in the place of the weights, where there is one; every rank must enter."""
        if not self._average:
            yield
            return
        _shard_again(model)
        trained = [weights.clone() for weights in _trained(model)]
        try:
            _put(model, self._average)
            yield
        finally:
            _shard_again(model)
            _put(model, trained)


def _trained(model: nn.Module) -> list[torch.Tensor]:
    """The memory of the parameters that train, under FSDP2 of this rank's shards."""
    tensors = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _shard_again(model: nn.Module) -> None:
    """FSDP2 may leave gathered weights behind a forward pass, which would be used once more as they are."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _put(model: nn.Module, values: list[torch.Tensor]) -> None:
    for weights, value in zip(_trained(model), values, strict=True):
        weights.copy_(value)
