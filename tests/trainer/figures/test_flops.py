import re

import pytest

from open_qwen2vl.trainer.figures.flops import GPUS, peak_flops


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("cpu", None),
    ],
)
def test_peaks_by_device_name(name, teraflops):
    assert peak_flops(name) == (teraflops and teraflops * 1e12)


def test_every_kind_of_gpu_is_found_by_its_own_name():
    names = {
        "gb200": "NVIDIA GB200",
        "b200": "NVIDIA B200",
        "h200-nvl": "NVIDIA H200 NVL",
        "h200": "NVIDIA H200",
        "h100-pcie": "NVIDIA H100 PCIe",
        "h100-nvl": "NVIDIA H100 NVL",
        "h100": "NVIDIA H100 80GB HBM3",
        "a100-40gb": "NVIDIA A100-SXM4-40GB",
        "a100-80gb": "NVIDIA A100 80GB PCIe",
        "l40s": "NVIDIA L40S",
        "rtx4090": "NVIDIA GeForce RTX 4090",
        "rtx5090": "NVIDIA GeForce RTX 5090",
        "rtx3090": "NVIDIA GeForce RTX 3090",
        "v100-32gb": "Tesla V100-SXM2-32GB",
        "v100-16gb": "Tesla V100-SXM2-16GB",
        "mi300x": "AMD Instinct MI300X",
        "a40": "NVIDIA A40",
        "a10": "NVIDIA A10",
        "l4": "NVIDIA L4",
        "a6000": "NVIDIA RTX A6000",
    }
    for kind, name in names.items():
        assert next(other for other, gpu in GPUS.items() if re.search(gpu.device_name, name)) == kind
    assert names.keys() == GPUS.keys()
