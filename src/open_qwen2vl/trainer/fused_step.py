"""What makes a step cheaper on a GPU: compiled blocks, Liger's kernels, a residual stream in bf16, products in float8.

Each is an option of the training, off by default, and a change of the model in memory alone: parameters keep their
names and types, so that checkpoints are those of a run without it. Own kernels are not needed: between them, Liger and
torch's compiler fuse RMSNorm, RoPE, SwiGLU and the additions of every known family.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import PreTrainedModel, trainer
from transformers.activations import ACT2FN

from ..families.interface import PackedModel
from .optimization import LANGUAGE_MODEL, part_of

logger = logging.getLogger(__name__)

# Below both of these torchao measured no gain over bf16 on an H100: casting costs what the product saves.
_FLOAT8_INPUTS, _FLOAT8_OUTPUTS = 4096, 1024


def prepare_fused_step(model: PreTrainedModel, args: Any, family: PackedModel) -> None:
    """Change a model, already prepared for packing, as the options say; before it is wrapped.

    Raises:
        ValueError: where a model has nothing that an option could change.
    """
    if args.use_liger_kernel:
        _use_liger(model, family.fused_classes)
    if args.bf16_residual:
        first = next(block for name, block in _blocks(model, family) if _is_language(name, family))
        first.register_forward_pre_hook(_in_autocast_dtype)
    if args.float8:
        _use_float8(model, family, emulate=args.device.type == "cpu")
    if args.torch_compile:
        compile_blocks(model, family, args.torch_compile_backend, args.torch_compile_mode)


def keep_whole_model_uncompiled(accelerator: Accelerator, args: Any) -> None:
    """Blocks are compiled and not the whole model, as accelerate would; a compiler of its own config is refused."""
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO and not args.torch_compile:
        raise ValueError("accelerate's config asks for a compiler (dynamo_config): give torch_compile: true instead")
    plugin.backend = DynamoBackend.NO


def _blocks(model: nn.Module, family: PackedModel) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of language model and vision tower, with their names."""
    return ((name, module) for name, module in model.named_modules() if type(module).__name__ in family.block_classes)


def _is_language(name: str, family: PackedModel) -> bool:
    return part_of(f"{name}.", family.parts) == LANGUAGE_MODEL


def _subclass(stock: type[nn.Module], forward: Callable) -> type[nn.Module]:
    """A class under the same name with another forward: FSDP, PEFT and checkpoints go by names."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "is_changed": True}
    return type(stock.__name__, (stock,), {"forward": functools.wraps(stock.forward)(forward), **names})


def _is_changed(module: nn.Module) -> bool:
    """Whether an earlier training has changed the class already."""
    return getattr(type(module), "is_changed", False)


def compile_blocks(model: nn.Module, family: PackedModel, backend: str, mode: str | None) -> None:
    """Compile each class of blocks of language model and vision tower once."""
    for _, block in _blocks(model, family):
        if not _is_changed(block):
            block.__class__ = _compiled_class(type(block), backend, mode)


# Cached: the compiler keeps its programs by function, of which a class must have one.
@functools.cache
def _compiled_class(stock: type[nn.Module], backend: str, mode: str | None) -> type[nn.Module]:
    """Blocks that run compiled in training: one program for all blocks of the class, then one for any lengths.

    Hooks stay outside, FSDP's among them, and so does activation checkpointing. Evaluation and generation stay
    uncompiled: each of their batches has shapes of its own.
    """
    # transformers puts the same function around all blocks, for checkpointing, and will put it around the subclass.
    inner = getattr(stock.forward, "__wrapped__", stock.forward)
    compiled = torch.compile(inner, backend=backend, mode=mode)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (compiled if self.training else inner)(self, *args, **kwargs)

    return _subclass(stock, forward)


def _in_autocast_dtype(block: nn.Module, inputs: tuple) -> tuple:
    """Let the first block add to a residual stream in autocast's type; RoPE's tables are fp32 by now, and stay so."""
    hidden, *rest = inputs
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return (hidden.to(dtype), *rest)


def _use_float8(model: nn.Module, family: PackedModel, emulate: bool) -> None:
    """Let the large products of the language model's blocks run in float8, scaled by tensor, in all three passes."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    # Padding, where the positions of a batch are no multiple of 16, which the units ask for.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    for name, block in _blocks(model, family):
        if _is_language(name, family):
            convert_to_float8_training(block, config=config, module_filter_fn=lambda layer, _: _gains_by_float8(layer))
    if not any(isinstance(module, Float8Linear) for module in model.modules()):
        raise ValueError("float8: the language model has no linear layer that is large enough to gain by it")
    if emulate:
        logger.warning("float8 is emulated on this device: its numbers, and no gain")


def _gains_by_float8(module: nn.Module) -> bool:
    """Whether it is a plain linear layer, no quantised one or part of an adapter, of sizes that the units take."""
    if type(module) is not nn.Linear or module.in_features % 16 or module.out_features % 16:
        return False
    return module.in_features > _FLOAT8_INPUTS or module.out_features > _FLOAT8_OUTPUTS


def _use_liger(model: nn.Module, fused_classes: dict[str, str]) -> None:
    """Run modules through Liger's kernels, each by a change of its class, as FSDP does it."""
    found = [module for module in model.modules() if type(module).__name__ in fused_classes]
    if not found:
        raise ValueError(f"use_liger_kernel: {type(model).__name__} has nothing that Liger's kernels could run")
    for module in found:
        operation = fused_classes[type(module).__name__]
        if operation == "swiglu" and not isinstance(module.act_fn, type(ACT2FN["silu"]) | nn.SiLU):
            raise ValueError(f"use_liger_kernel: the model's MLPs have {module.act_fn}, and Liger's SiLU")
        if not _is_changed(module):
            module.__class__ = _liger_class(type(module), operation)


@functools.cache
def _liger_class(stock: type[nn.Module], operation: str) -> type[nn.Module]:
    from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction
    from liger_kernel.transformers import liger_rotary_pos_emb

    def rms_norm(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon)

    def swiglu(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x), 1.0, 1.0))

    if operation == "rope":
        return _subclass(stock, _with_global(stock.forward, "apply_rotary_pos_emb", liger_rotary_pos_emb))
    return _subclass(stock, {"rms_norm": rms_norm, "swiglu": swiglu}[operation])


def _with_global(function: FunctionType, name: str, value: Any) -> FunctionType:
    """A copy of a function that finds another value under a name of its module: others' models stay as they are."""
    if name not in function.__code__.co_names:
        raise ValueError(f"use_liger_kernel: {function.__qualname__} of this transformers calls no {name}")
    variables = {**function.__globals__, name: value}
    copy = FunctionType(function.__code__, variables, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@contextlib.contextmanager
def liger_off() -> Iterator[None]:
    """Keep Trainer from a call of Liger's own, which replaces a model's forward, that of packs and their loss.

    `prepare_fused_step` has done already what `use_liger_kernel` may do.
    """
    stock, trainer.apply_liger_kernel = trainer.apply_liger_kernel, lambda model, config: None
    try:
        yield
    finally:
        trainer.apply_liger_kernel = stock
