"""Muon on matrices in shards against itself on whole ones, run by `test_two_processes.py` on two processes."""

import itertools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from open_qwen2vl.trainer.muon import MuonAdamW

SHAPES = ((64, 48), (48, 64), (33, 64), (64, 33), (3, 8))  # not all of them divide by two; the last has a short shard


def main() -> None:
    """Three steps on the same gradients; not close, but the same."""
    dist.init_process_group("gloo")
    fsdp, hsdp = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    for shape, (mesh, placements) in itertools.product(SHAPES, ((fsdp, [Shard(0)]), (hsdp, [Replicate(), Shard(0)]))):
        torch.manual_seed(0)
        whole = nn.Parameter(torch.randn(shape))
        sharded = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, placements))
        expected, found = (
            MuonAdamW([{"params": [one], "weight_decay": 0.1}], [], lr=0.1, betas=(0.9, 0.999), eps=1e-8)
            for one in (whole, sharded)
        )
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
