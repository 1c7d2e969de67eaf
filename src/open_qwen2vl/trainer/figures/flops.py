"""What a step of training costs: its FLOPs, the parameters that they come from, and the peaks of known GPUs.

One count for the MFU of a run, the estimate before it and the benchmarks. It is what the mathematics needs, not what a
kernel spends: padding, recomputed activations and logits that nobody asked for are no work to be proud of.
"""

import re
from typing import NamedTuple

from transformers import PreTrainedConfig


class Gpu(NamedTuple):
    """A kind of GPU.

    Attributes:
        device_name (`str`): regular expression found in torch's device name.
        peak_flops (`float`): dense bf16 FLOP/s with fp32 accumulation (NVIDIA's data sheets).
        memory (`float`): GiB that torch can use (`total_memory`), a little less than the name says.
    """

    device_name: str
    peak_flops: float
    memory: float


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
    """Dense bf16 peak of a device.

    Args:
        device_name (`str`): as `torch.cuda.get_device_name` gives it.

    Returns:
        `float`: FLOP/s, or None where it is not known: CPUs, other GPUs, slices of a GPU.
    """
    if "MIG" in device_name:
        return None
    return next((gpu.peak_flops for gpu in GPUS.values() if re.search(gpu.device_name, device_name)), None)


def language_model_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a Qwen2 model with embeddings and head counted once (1,543,714,304 for Qwen2.5-1.5B).

    Args:
        config (`PreTrainedConfig`): the text config.

    Returns:
        `int`: their number.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    queries, keys_values = heads * head_dim, 2 * config.num_key_value_heads * head_dim
    attention = (hidden + 1) * (queries + keys_values) + queries * hidden
    block = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    return config.num_hidden_layers * block + hidden + config.vocab_size * hidden


def vision_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the vision blocks that run (26 of the 27 of SigLIP-SO400M).

    Args:
        config (`OpenQwen2VLConfig`): the whole model's config.

    Returns:
        `int`: their number; embeddings and final norm are not blocks.
    """
    width, inner = config.vision_config.hidden_size, config.vision_config.intermediate_size
    block = 4 * (width + 1) * width + (width + 1) * inner + (inner + 1) * width + 4 * width
    return config.num_vision_blocks * block


def step_flops(
    config: PreTrainedConfig,
    tokens: int,
    squared_lengths: int,
    images: int,
    image_seq_length: int,
    train_projector: bool = True,
    train_language_model: bool = True,
    train_vision_tower: bool = False,
    adapter_parameters: int = 0,
) -> int:
    """FLOPs that a forward and backward over packed documents need.

    A forward is 2 FLOPs per parameter and position, gradients of the activations 2 more, gradients of the weights
    2 more; what nothing before it needs is left out. The head is counted at every real position, as is usual, though
    only labelled ones are computed. Attention is causal within documents, and full within images.

    Args:
        config (`OpenQwen2VLConfig`): the model's config.
        tokens (`int`): real positions; padding is no work to be proud of.
        squared_lengths (`int`): sum over documents of their length squared.
        images (`int`): number of images.
        image_seq_length (`int`): tokens per image.
        train_projector (`bool`, *optional*, defaults to `True`): whether it is trained.
        train_language_model (`bool`, *optional*, defaults to `True`): whether it is trained.
        train_vision_tower (`bool`, *optional*, defaults to `False`): whether it is trained.
        adapter_parameters (`int`, *optional*, defaults to 0): parameters of low-rank updates in the language model,
            which are trained beside its own.

    Returns:
        `int`: floating-point operations, a multiply-add being two.
    """
    text, vision = config.text_config, config.vision_config
    # 6 N per position where it is trained; 4 N where gradients only pass through to the image features.
    language = (6 if train_language_model else 4) * language_model_parameters(text) * tokens
    language += 6 * text.num_hidden_layers * text.hidden_size * squared_lengths + 6 * adapter_parameters * tokens

    projector_parameters = (vision.hidden_size + 1 + text.hidden_size + 1) * text.hidden_size
    projector_passes = 3 if train_projector else 2 if train_vision_tower else 1
    projector = 2 * projector_passes * projector_parameters * images * image_seq_length

    patches = config.patches_per_side**2
    vision_forward = 2 * vision_parameters(config) * patches
    vision_forward += 4 * config.num_vision_blocks * vision.hidden_size * patches**2
    return language + projector + (3 if train_vision_tower else 1) * vision_forward * images
