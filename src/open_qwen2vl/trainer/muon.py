"""`optim: muon`: matrices of hidden layers by Muon, all else by AdamW, in one optimizer.

Muon (Jordan 2024) moves a matrix by its momentum made orthogonal. Rates as of Moonlight (arXiv 2502.16982): the update
times 0.2 * sqrt(max(rows, columns)) is as large as AdamW's, so that a recipe keeps its learning rates and decay.
Embeddings, head, norms, biases, patch and position embeddings are AdamW's, as both papers have it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

# Private, but torch's Muon has no other form that takes a matrix in shards.
from torch.optim._muon import _adjust_lr
from transformers import PreTrainedModel

from .arguments import PackedArguments


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some parameters and fused AdamW for the others.

    Groups of Muon's have its options (`ns_steps` tells them apart), those of AdamW's its own. Under FSDP2 each matrix
    is gathered, for a row says nothing of its directions; momentum and weights stay in shards. Under DDP each rank
    computes the updates of its part of the matrices, and all have all of them.

    Args:
        matrices (`list[dict]`): groups of parameters of two dimensions, with `weight_decay`.
        others (`list[dict]`): groups of other parameters.
        lr (`float`): learning rate of all.
        betas (`tuple[float, float]`): AdamW's.
        eps (`float`): AdamW's.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ):
        groups = []
        if matrices:
            groups += torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw").param_groups
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True) if others else None
        groups += self._adamw.param_groups if self._adamw else []
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters that have a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [group for group in self.param_groups if "ns_steps" in group]
        _move_matrices([(p, group, self.state[p]) for group in groups for p in group["params"] if p.grad is not None])
        if self._adamw is not None:
            # At each step: a checkpoint, a schedule and FSDP2 put other groups and states in the place of these.
            self._adamw.param_groups = [group for group in self.param_groups if "ns_steps" not in group]
            self._adamw.state = self.state
            self._adamw.step()
        return loss


def _move_matrices(matrices: list[tuple[nn.Parameter, dict[str, Any], dict[str, Any]]]) -> None:
    """The step of `torch.optim.Muon` on each matrix `(rows, columns)` or its shard, with its group and its state.

    Under DDP all ranks have the same matrices: each rank makes its part of them orthogonal for all.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    updates: dict[int, torch.Tensor] = {}
    # Large ones first, in turn: about the same work for each rank.
    matrices = sorted(matrices, key=lambda one: -one[0].numel())
    for place, (parameter, group, state) in enumerate(matrices):
        update = _nesterov(parameter.grad, group["momentum"], state)
        if ranks == 1 or isinstance(parameter, DTensor):
            _move(parameter, group, _orthogonal(update, group))
        elif place % ranks == dist.get_rank():
            updates[place] = _orthogonal(update, group).contiguous()
    if ranks == 1:
        return
    for place, (parameter, group, _) in enumerate(matrices):
        if not isinstance(parameter, DTensor):
            empty = place % ranks != dist.get_rank()
            update = torch.empty_like(parameter, dtype=_iteration_dtype(parameter)) if empty else updates.pop(place)
            dist.broadcast(update, place % ranks)
            _move(parameter, group, update)


def _move(parameter: nn.Parameter, group: dict[str, Any], update: torch.Tensor) -> None:
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(update, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape))


def _nesterov(gradient: torch.Tensor, momentum: float, state: dict[str, Any]) -> torch.Tensor:
    """Take a gradient into the momentum of `state`; returns where both lead."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
    state["momentum_buffer"].lerp_(gradient, 1 - momentum)
    return gradient.lerp(state["momentum_buffer"], momentum)


def _iteration_dtype(tensor: torch.Tensor) -> torch.dtype:
    # Few CPUs multiply in bf16: there the iteration takes 4 (AVX-512) to 18 times (AVX2) as long in it as in fp32.
    return torch.float32 if tensor.device.type == "cpu" else torch.bfloat16


def _orthogonal(update: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """The nearest matrix with singular values of about one, `(rows, columns)`, sharded as it came."""
    # Rounded before it travels: the iteration begins with that.
    update = update.to(_iteration_dtype(update))
    whole = update.full_tensor() if isinstance(update, DTensor) else update
    whole = newton_schulz(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
    if not isinstance(update, DTensor):
        return whole
    # Every rank has computed the same: each takes its part, nothing is sent.
    return distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)


def newton_schulz(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """The iteration of `torch.optim.Muon`, which knows bf16 alone, in the type of `matrix` `(rows, columns)`."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def hidden_matrices(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Trained weights `(out, in)` of linear layers, the head's apart."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head and module.weight.requires_grad:
            yield module.weight


def muon_and_adamw(model: PreTrainedModel, args: PackedArguments) -> MuonAdamW:
    """The optimizer of a model for `optim: muon`; what has one dimension does not decay."""
    matrices = list(hidden_matrices(model))
    theirs = set(matrices)
    others = [p for p in model.parameters() if p.requires_grad and p not in theirs]
    decayed, plain = [p for p in others if p.ndim >= 2], [p for p in others if p.ndim < 2]
    return MuonAdamW(
        _group(matrices, args.weight_decay),
        _group(decayed, args.weight_decay) + _group(plain, 0.0),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


def _group(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": parameters, "weight_decay": weight_decay}] if parameters else []
