"""Bytes that the operators of a block move, products and attention apart, counted on tensors without contents.

A fused kernel is one operator that reads its inputs and writes its outputs, in both passes.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, Qwen2Config, SiglipVisionConfig, SiglipVisionModel
from transformers.initialization import no_init_weights
from transformers.models.qwen2 import modeling_qwen2

# Products and attention have rates of their own; the rest moves nothing.
ELSEWHERE = ("mm", "addmm", "bmm", "convolution", "scaled_dot_product")
NOTHING = ("empty", "new_empty", "detach", "alias", "_unsafe_view", "device", "lift_fresh")


def size(values: Any) -> int:
    return sum(v.numel() * v.element_size() for v in tree_leaves(values) if isinstance(v, torch.Tensor))


class Traffic(TorchDispatchMode):
    """`moved` by all operators since it was set to 0."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.__name__
        if not (func.is_view or name.startswith(NOTHING) or any(heavy in name for heavy in ELSEWHERE)):
            self.moved += size((args, kwargs, output))
        return output


class _Fused(torch.autograd.Function):
    """Outputs like the first inputs in a type; backward keeps and reads all inputs again where it `reads`."""

    @staticmethod
    def forward(ctx: Any, traffic: Traffic, outputs: int, dtype: torch.dtype, reads: bool, *inputs: torch.Tensor):
        made = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in inputs[:outputs])
        traffic.moved += size((inputs, made))
        ctx.save_for_backward(*inputs)
        ctx.traffic, ctx.reads = traffic, reads
        return made if outputs > 1 else made[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        made = [torch.empty_like(tensor) if tensor.requires_grad else None for tensor in ctx.saved_tensors]
        ctx.traffic.moved += size((gradients, made)) + ctx.reads * size(ctx.saved_tensors)
        return None, None, None, None, *made


@contextlib.contextmanager
def fused(traffic: Traffic, casts: bool) -> Iterator[None]:
    """Norms, RoPE and SwiGLU as one kernel each; with `casts` norms write what products take, as a compiler does."""

    def norm(module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return _Fused.apply(traffic, 1, torch.bfloat16 if casts else hidden.dtype, True, hidden)

    def rope(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any) -> tuple:
        return _Fused.apply(traffic, 2, query.dtype, False, query, key)

    def mlp(module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_proj(hidden), module.up_proj(hidden)
        return module.down_proj(_Fused.apply(traffic, 1, gate.dtype, True, gate, up))

    with (
        mock.patch.object(modeling_qwen2.Qwen2RMSNorm, "forward", norm),
        mock.patch.object(modeling_qwen2, "apply_rotary_pos_emb", rope),
        mock.patch.object(modeling_qwen2.Qwen2MLP, "forward", mlp),
    ):
        yield


def _per_block(make: Callable[[int, int], tuple[int, int]]) -> tuple[float, float]:
    """Forward and backward of a block for a position, from one and two blocks and two lengths."""
    counts = {(blocks, units): make(blocks, units) for blocks in (1, 2) for units in (64, 128)}
    return tuple((counts[2, 128][i] - counts[1, 128][i] - counts[2, 64][i] + counts[1, 64][i]) / 64 for i in (0, 1))


def language_block(
    hidden: int, inner: int, keys: int, fusion: str = "", residual: str = "float32", weights: str = "float32"
) -> tuple[float, float]:
    """Bytes for a position, of the forward and the backward pass, of a Qwen2 block; `keys` are the width of keys.

    `fusion` is empty, `kernels` or `compiled`. Computed in bf16; FSDP2 gives weights in it.
    """

    def make(blocks: int, positions: int) -> tuple[int, int]:
        config = Qwen2Config(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=blocks,
            num_attention_heads=hidden // 64,
            num_key_value_heads=keys // 64,
            vocab_size=64,
        )
        traffic = Traffic()
        with FakeTensorMode(), no_init_weights(), contextlib.ExitStack() as stack:
            if fusion:
                stack.enter_context(fused(traffic, fusion == "compiled"))
            model = AutoModel.from_config(config, attn_implementation="sdpa", dtype=getattr(torch, weights)).train()
            embeds = torch.empty(1, positions, hidden, dtype=getattr(torch, residual), requires_grad=True)
            masks = dict.fromkeys(config.layer_types)
            with traffic:
                with torch.autocast("cpu", torch.bfloat16):
                    output = model(inputs_embeds=embeds, attention_mask=masks, use_cache=False).last_hidden_state
                forward = traffic.moved
                output.backward(torch.empty_like(output))
        return forward, traffic.moved - forward

    return _per_block(make)


def tower_block(hidden: int, inner: int, trained: bool) -> tuple[float, float]:
    """Bytes for a patch of a SigLIP block: frozen in bf16, or trained in fp32 under autocast."""
    dtype = torch.float32 if trained else torch.bfloat16

    def make(blocks: int, patches: int) -> tuple[int, int]:
        sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": hidden // 64}
        config = SiglipVisionConfig(num_hidden_layers=blocks, image_size=64, patch_size=8, **sizes)
        config.vision_use_head = False
        traffic = Traffic()
        with FakeTensorMode(), no_init_weights():
            model = SiglipVisionModel._from_config(config, attn_implementation="sdpa", dtype=dtype)
            model.train().requires_grad_(trained)
            pixels = torch.empty(patches // 64, 3, 64, 64, dtype=dtype)
            with traffic, torch.set_grad_enabled(trained):
                with torch.autocast("cpu", torch.bfloat16):
                    output = model(pixels).last_hidden_state
                forward = traffic.moved
                if trained:
                    output.backward(torch.empty_like(output))
        return forward, traffic.moved - forward

    return _per_block(make)
