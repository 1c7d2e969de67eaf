"""The peaks of known GPUs, for the MFU of a run, the estimate before it and the benchmarks.

The FLOPs of a step are its family's (`PackedModel.step_flops`): what the mathematics needs, not what a kernel spends.
Padding, recomputed activations and logits that nobody asked for are no work to be proud of.
"""

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """A kind of GPU."""

    device_name: str  # regular expression found in torch's device name
    peak_flops: float  # dense bf16 FLOP/s with fp32 accumulation (NVIDIA's data sheets)
    memory: float  # GiB that torch can use (`total_memory`), a little less than the name says


# By the name that `open-qwen2vl estimate --gpu` takes; of two that fit a device name, the more special one first. Of
# cards without bf16 (V100) the peak of fp16. Ampere and later GeForce cards halve their peak with fp32 accumulation.
GPUS = {
    "gb200": Gpu("GB200", 2500e12, 184),
    "b200": Gpu("B200", 2250e12, 178),
    "h200-nvl": Gpu("H200 NVL", 835e12, 139),
    "h200": Gpu("H200", 989e12, 139),
    "h100-pcie": Gpu("H100 PCIe", 756e12, 79),
    "h100-nvl": Gpu("H100 NVL", 835e12, 93),
    "h100": Gpu("H100", 989e12, 79),
    "a100-40gb": Gpu("A100.*40GB", 312e12, 39),
    "a100-80gb": Gpu("A100", 312e12, 79),
    "v100-32gb": Gpu("V100.*32GB", 125e12, 31.7),
    "v100-16gb": Gpu("V100.*16GB", 125e12, 15.8),
    "mi300x": Gpu("MI300X", 1307e12, 191),
    "a40": Gpu("A40$", 150e12, 44.4),
    "a10": Gpu("A10$", 125e12, 22),
    "l40s": Gpu("L40S", 362e12, 44),
    "l4": Gpu("L4$", 121e12, 22),
    "a6000": Gpu("RTX A6000", 155e12, 47.4),
    "rtx5090": Gpu("RTX 5090$", 210e12, 31.3),
    "rtx4090": Gpu("RTX 4090$", 165e12, 23.5),
    "rtx3090": Gpu("RTX 3090$", 71e12, 23.6),
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by torch's name for it; None for CPUs, other GPUs, slices of a GPU."""
    if "MIG" in device_name:
        return None
    return next((gpu.peak_flops for gpu in GPUS.values() if re.search(gpu.device_name, device_name)), None)
