"""One attention layer of the language model over the documents of a pack: how fast each backend is, and how exact.

Exactness is against every document alone in fp32: the relative error, by norms, of the output and of the gradients.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

from open_qwen2vl import PackingCollator
from open_qwen2vl.modeling.attention import packed_varlen_attention

from .models import SIZES, Bench
from .running import Skip

MOST_ERROR = 0.02  # in bf16, whose numbers are 0.4 % apart; kernels differ in the order of their sums
_FLASH, _CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
# Of each, torch's kernel; MATH, for what is no packed attention, is never eligible there.
VARLEN = {"varlen, flash": [_FLASH, SDPBackend.MATH], "varlen, cuDNN": [_CUDNN, SDPBackend.MATH]}
MASKED = {"sdpa, dense mask": sdpa_attention_forward, "eager, dense mask": eager_attention_forward}


class Layer:
    """Queries, keys and values `(1, heads, S, head_dim)` of a pack, and its documents' lengths."""

    def __init__(self, bench: Bench):
        text = SIZES[bench.size]["text"]
        heads, kv_heads, total = text["num_attention_heads"], 2, SIZES[bench.size]["max_length"]
        head_dim = text["hidden_size"] // heads
        image = SIZES[bench.size]["image_seq_length"]
        draw = torch.Generator().manual_seed(0)
        lengths = []
        while sum(lengths) < total:
            text_length = 3 + int(torch.empty(()).exponential_(1 / 29, generator=draw))
            lengths.append(min(image + text_length, total - sum(lengths)))
        self.lengths = lengths
        dtype = torch.bfloat16 if bench.gpu else torch.float32
        shapes = [(1, count, total, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
        values = [torch.randn(shape, generator=draw).to(bench.device, dtype) for shape in shapes]
        self.states = [each.requires_grad_() for each in values[:3]]
        self.weight = values[3].transpose(1, 2)  # of the output, in the sum that is differentiated
        self.bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=bench.device)
        self.packed = {"cu_seq_lens_q": self.bounds, "max_length_q": max(lengths)}
        self.module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True, training=True)
        self.scaling = head_dim**-0.5

    def mask(self) -> torch.Tensor:
        """`(1, 1, S, S)`: whether a position sees another."""
        document = torch.repeat_interleave(torch.tensor(self.lengths)).to(self.bounds.device)
        return (document[:, None] == document).tril()[None, None]

    def attend(self, backend: str) -> torch.Tensor:
        """Output `(1, S, heads, head_dim)`."""
        if backend in VARLEN:
            return self._varlen(backend)
        mask = self._mask_of(backend)
        return MASKED[backend](self.module, *self.states, mask, scaling=self.scaling)[0]

    def _varlen(self, backend: str) -> torch.Tensor:
        if not self.bounds.is_cuda:
            choice = contextlib.nullcontext()
        elif _CUDNN in VARLEN[backend] and not hasattr(varlen, "_select_backend"):
            raise Skip(f"varlen_attn of torch {torch.__version__} has flash alone")
        else:
            choice = sdpa_kernel(VARLEN[backend])
        try:
            with choice:
                return packed_varlen_attention(self.module, *self.states, None, self.scaling, **self.packed)[0]
        except RuntimeError as refused:
            if "CUDNN_ATTENTION was requested" not in str(refused):
                raise
            raise Skip(" ".join(str(refused).split())) from refused

    def _mask_of(self, backend: str) -> torch.Tensor:
        if not hasattr(self, "_masks"):
            mask = self.mask()
            added = torch.zeros(mask.shape, device=mask.device, dtype=self.weight.dtype)
            self._masks = {"sdpa": mask, "eager": added.masked_fill(~mask, torch.finfo(added.dtype).min)}
        return self._masks[backend.split(",")[0]]

    def step(self, backend: str) -> list[torch.Tensor]:
        """Output, and gradients of queries, keys and values."""
        output = self.attend(backend)
        return [output.detach(), *torch.autograd.grad((output * self.weight).sum(), self.states)]

    def alone(self) -> list[torch.Tensor]:
        """The same of every document by itself, in fp32."""
        states = [each.detach().float().requires_grad_() for each in self.states]
        outputs, start = [], 0
        for length in self.lengths:
            part = [each[:, :, start : start + length] for each in states]
            seen = torch.ones(length, length, dtype=torch.bool, device=self.bounds.device).tril()
            mask = torch.zeros(length, length, device=seen.device).masked_fill(~seen, -math.inf)
            outputs.append(eager_attention_forward(self.module, *part, mask, scaling=self.scaling)[0])
            start += length
        output = torch.cat(outputs, dim=1)
        return [output.detach(), *torch.autograd.grad((output * self.weight.float()).sum(), states)]


class Branches(Layer):
    """The same lengths as conversations that share pictures: of five the first holds the picture of all."""

    def __init__(self, bench: Bench):
        super().__init__(bench)
        image = SIZES[bench.size]["image_seq_length"]
        starts = [0 if number % 5 == 0 else image for number in range(len(self.lengths))]
        positions = [torch.arange(start, start + own) for start, own in zip(starts, self.lengths, strict=True)]
        position_ids = torch.cat(positions)
        nothing = torch.zeros_like(position_ids)
        batch = PackingCollator()([{"input_ids": nothing, "labels": nothing, "position_ids": position_ids}])
        self.seen = batch["key_positions"].split(batch["cu_seq_lens_k"].diff().tolist())
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "key_positions")
        self.packed = {name: batch[name] for name in names}
        self.packed |= {n: v.to(bench.device) for n, v in self.packed.items() if isinstance(v, torch.Tensor)}

    def alone(self) -> list[torch.Tensor]:
        """Every conversation by itself, with its picture, in fp32."""
        states = [each.detach().float().requires_grad_() for each in self.states]
        outputs = []
        for seen, length in zip(self.seen, self.lengths, strict=True):
            part = [each[:, :, seen.to(each.device)] for each in states]
            visible = torch.ones(len(seen), len(seen), dtype=torch.bool, device=self.bounds.device).tril()
            mask = torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, -math.inf)
            outputs.append(eager_attention_forward(self.module, *part, mask, scaling=self.scaling)[0][:, -length:])
        output = torch.cat(outputs, dim=1)
        return [output.detach(), *torch.autograd.grad((output * self.weight.float()).sum(), states)]


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)).item()


def exactness(bench: Bench, backend: str, kind: type[Layer] = Layer) -> dict:
    """Errors of a backend against every document alone."""
    layer = kind(bench)
    output, *gradients = zip(layer.step(backend), layer.alone(), strict=True)
    errors = [relative_error(*output), max(relative_error(*pair) for pair in gradients)]
    return {"output error": errors[0], "gradient error": errors[1], "right": max(errors) <= MOST_ERROR}


def milliseconds(run: Callable[[], object], bench: Bench) -> float:
    """The median time of a call, after three that do not count (one call on a CPU)."""
    if not bench.gpu:
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    times = []
    for _ in range(3 + 20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def speed(bench: Bench, backend: str) -> dict:
    """Forward and backward of one layer, and of as many as the model has."""
    layer = Layer(bench)
    if bench.gpu:
        torch.cuda.reset_peak_memory_stats()
    one = milliseconds(lambda: layer.step(backend), bench)
    peak = torch.cuda.max_memory_allocated() / 2**30 if bench.gpu else None
    return {"ms a layer": one, "ms a pack": one * SIZES[bench.size]["text"]["num_hidden_layers"], "GiB": peak}


def cases(what: Callable[[Bench, str], dict]) -> dict[str, Callable[[Bench], dict]]:
    return {name: lambda bench, name=name: what(bench, name) for name in (*VARLEN, *MASKED)}


CASES = cases(speed)
