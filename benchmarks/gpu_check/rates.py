"""What the card really does, beside what predictions assume: matrix products at the model's shapes, and copies."""

from collections.abc import Callable

import torch

from .attention import milliseconds
from .models import SIZES, Bench
from .running import Skip

FP8 = torch.float8_e4m3fn


def shapes(bench: Bench) -> dict[str, tuple[int, int, int]]:
    """Rows, inner and outer width of the largest products of a pack."""
    sizes = SIZES[bench.size]
    text, vision, rows = sizes["text"], sizes["vision"], sizes["max_length"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    images = rows // (sizes["image_seq_length"] + 32) or 1
    return {
        "language model": (rows, text["hidden_size"], text["intermediate_size"]),
        "vision tower": (images * patches // 16 * 16, vision["hidden_size"], vision["intermediate_size"]),
        "head": (rows // 8, text["hidden_size"], sizes["vocab_size"]),
    }


def rate(bench: Bench, name: str, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
    """TFLOP/s of a product of bf16 matrices `(rows, inner)` and `(outer, inner)`."""
    rows, inner, outer = shapes(bench)[name]
    a, b = (torch.randn(count, inner, device=bench.device, dtype=torch.bfloat16) for count in (rows, outer))
    return 2 * rows * inner * outer / milliseconds(lambda: product(a, b), bench) / 1e9


def bf16(bench: Bench) -> dict:
    """TFLOP/s in bf16."""
    return {f"{name}, TFLOP/s": rate(bench, name, torch.nn.functional.linear) for name in shapes(bench)}


def fp8(bench: Bench) -> dict:
    """TFLOP/s with both matrices in fp8, rows scaled; the cast from bf16 is not in it."""
    if bench.gpu and torch.cuda.get_device_capability() < (8, 9):
        raise Skip("the card has no fp8")
    figures = {}
    for name, (rows, inner, outer) in shapes(bench).items():
        a, b = (torch.randn(count, inner, device=bench.device).to(FP8) for count in (rows, outer))
        scales = torch.ones(rows, 1, device=bench.device), torch.ones(1, outer, device=bench.device)

        def product(a=a, b=b, scales=scales):
            return torch._scaled_mm(a, b.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)

        figures[f"{name}, TFLOP/s"] = 2 * rows * inner * outer / milliseconds(product, bench) / 1e9
    return figures


def memory(bench: Bench) -> dict:
    """TB/s of a copy, reading and writing."""
    count = 1 << (28 if bench.gpu else 16)
    source, target = (torch.empty(count, device=bench.device) for _ in range(2))
    return {"TB/s": 2 * 4 * count / milliseconds(lambda: target.copy_(source), bench) / 1e9}


CASES = {"bf16 products": bf16, "fp8 products": fp8, "copies": memory}
