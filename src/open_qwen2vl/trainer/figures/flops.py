"""The peaks of known GPUs, for the MFU of a run, the estimate before it and the benchmarks.

The FLOPs of a step are its family's (`PackedModel.step_flops`): what the mathematics needs, not what a kernel spends.
Padding, recomputed activations and logits that nobody asked for are no work to be proud of.
"""

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """A kind of GPU, by the vendors' data sheets."""

    device_name: str  # regular expression found in torch's device name
    peak_flops: float  # dense bf16 FLOP/s with fp32 accumulation
    memory: float  # GiB that torch can use (`total_memory`), a little less than the name says
    bandwidth: float = 0.0  # bytes/s of its memory
    link: float = 32e9  # bytes/s and direction to the GPUs of its machine: NVLink, or PCIe
    network: float = 12.5e9  # bytes/s to other machines, of the network that is usual beside it
    float8: bool = False  # whether it multiplies float8


# By the name that `open-qwen2vl estimate --gpu` takes; of two that fit a device name, the more special one first. Of
# cards without bf16 (V100) the peak of fp16. Ampere and later GeForce cards halve their peak with fp32 accumulation.
GPUS = {
    "gb200": Gpu("GB200", 2500e12, 184, 8.0e12, 900e9, 50e9, True),
    "b200": Gpu("B200", 2250e12, 178, 8.0e12, 900e9, 50e9, True),
    "h200-nvl": Gpu("H200 NVL", 835e12, 139, 4.8e12, 450e9, 50e9, True),
    "h200": Gpu("H200", 989e12, 139, 4.8e12, 450e9, 50e9, True),
    "h100-pcie": Gpu("H100 PCIe", 756e12, 79, 2.0e12, 64e9, 25e9, True),
    "h100-nvl": Gpu("H100 NVL", 835e12, 93, 3.9e12, 300e9, 50e9, True),
    "h100": Gpu("H100", 989e12, 79, 3.35e12, 450e9, 50e9, True),
    "a100-40gb": Gpu("A100.*40GB", 312e12, 39, 1.555e12, 300e9, 25e9),
    "a100-80gb": Gpu("A100", 312e12, 79, 2.039e12, 300e9, 25e9),
    "v100-32gb": Gpu("V100.*32GB", 125e12, 31.7, 0.9e12, 150e9),
    "v100-16gb": Gpu("V100.*16GB", 125e12, 15.8, 0.9e12, 150e9),
    "mi300x": Gpu("MI300X", 1307e12, 191, 5.3e12, 448e9, 50e9, True),
    "a40": Gpu("A40$", 150e12, 44.4, 0.696e12, 32e9),
    "a10": Gpu("A10$", 125e12, 22, 0.6e12, 32e9),
    "l40s": Gpu("L40S", 362e12, 44, 0.864e12, 32e9, 12.5e9, True),
    "l4": Gpu("L4$", 121e12, 22, 0.3e12, 32e9, 12.5e9, True),
    "a6000": Gpu("RTX A6000", 155e12, 47.4, 0.768e12, 32e9),
    "rtx5090": Gpu("RTX 5090$", 210e12, 31.3, 1.792e12, 64e9, 12.5e9, True),
    "rtx4090": Gpu("RTX 4090$", 165e12, 23.5, 1.008e12, 32e9, 12.5e9, True),
    "rtx3090": Gpu("RTX 3090$", 71e12, 23.6, 0.936e12, 32e9),
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by torch's name for it; None for CPUs, other GPUs, slices of a GPU."""
    if "MIG" in device_name:
        return None
    return next((gpu.peak_flops for gpu in GPUS.values() if re.search(gpu.device_name, device_name)), None)
