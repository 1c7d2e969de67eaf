"""Muon on matrices in shards and shared out against itself alone, run by `test_two_processes.py` on two processes."""

import itertools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from open_qwen2vl.trainer.muon import MuonAdamW

SHAPES = ((64, 48), (48, 64), (33, 64), (64, 33), (3, 8))  # not all of them divide by two; the last has a short shard


def optimizer_of(matrices: list[nn.Parameter]) -> MuonAdamW:
    return MuonAdamW([{"params": matrices, "weight_decay": 0.1}], [], lr=0.1, betas=(0.9, 0.999), eps=1e-8)


def moved_matrices() -> list[nn.Parameter]:
    """One of each shape after three steps."""
    torch.manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = optimizer_of(matrices)
    for _ in range(3):
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        optimizer.step()
    return matrices


def main() -> None:
    """Three steps on the same gradients; not close, but the same."""
    alone = moved_matrices()
    dist.init_process_group("gloo")
    # Each rank computes the updates of some of them.
    assert all(map(torch.equal, alone, moved_matrices()))
    fsdp, hsdp = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    for shape, (mesh, placements) in itertools.product(SHAPES, ((fsdp, [Shard(0)]), (hsdp, [Replicate(), Shard(0)]))):
        torch.manual_seed(0)
        whole = nn.Parameter(torch.randn(shape))
        sharded = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, placements))
        expected, found = optimizer_of([whole]), optimizer_of([sharded])
        for _ in range(3):
            whole.grad = torch.randn(shape)
            sharded.grad = distribute_tensor(whole.grad, mesh, placements)
            expected.step()
            found.step()
        assert found.state[sharded]["momentum_buffer"].to_local().shape == sharded.to_local().shape
        assert torch.equal(sharded.full_tensor(), whole), shape
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
