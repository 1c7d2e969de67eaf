"""Bytes that a micro-batch moves through a GPU's memory, matrix products and attention apart.

Every operator of an eager step reads its inputs and writes its outputs there; a fused one does so once for all that it
fuses. The factors below are those of a block's operators, which `tests/estimate/test_time.py` counts anew.
"""

from transformers import PreTrainedConfig

from ..modeling.loss import CHUNK_BYTES
from .memory import Training

Factors = tuple[tuple[int, int, int], tuple[int, int, int]]

# A Qwen block, by what fuses norms, RoPE and SwiGLU, and whether the residual stream is bf16: bytes for each position,
# as factors of the hidden width, the inner width and the width of the keys; forward and backward.
BLOCK: dict[tuple[str, bool], Factors] = {
    ("", False): ((142, 10, 36), (354, 18, 62)),
    ("", True): ((138, 10, 20), (336, 18, 36)),
    ("kernels", False): ((70, 6, 4), (132, 10, 8)),
    ("kernels", True): ((24, 6, 4), (48, 10, 8)),
    ("compiled", False): ((36, 6, 4), (80, 10, 8)),
    ("compiled", True): ((24, 6, 4), (48, 10, 8)),
}
SHARDED_BLOCK: Factors = ((104, 10, 20), (256, 18, 36))  # eager, with the bf16 weights that FSDP2 gives
# A block of the vision tower, for each patch: factors of its two widths; frozen in bf16, or trained under autocast.
TOWER = {False: ((20, 4), (0, 0)), True: ((60, 4), (118, 8))}
LOGIT_BYTES = 20  # softmax, its exponential and what becomes of it in the gradient, for each logit
# For each trained weight: cast to bf16 and its gradient from it (6 bytes each), added to the fp32 sum (12). In the
# optimizer's step: weight read and written, gradient read (12), beside the states, after clipping (12).
WEIGHT_BYTES, OPTIMIZER_BYTES = 24, 24


def block_bytes(config: PreTrainedConfig, training: Training, positions: float, sharded: bool) -> float:
    """Of the language model's blocks."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    widths = (text.hidden_size, text.intermediate_size, text.num_key_value_heads * head_dim)
    residual = training.bf16_residual or (sharded and training.bf16)
    forward, backward = BLOCK[training.fused_by, residual]
    if sharded and training.bf16 and not training.fused_by:
        forward, backward = SHARDED_BLOCK
    again = 1 / training.checkpoint_every if training.checkpoint_every else 0
    factors = ((1 + again) * f + b for f, b in zip(forward, backward, strict=True))
    return text.num_hidden_layers * positions * sum(f * width for f, width in zip(factors, widths, strict=True))


def tower_bytes(config: PreTrainedConfig, training: Training, patches: float) -> float:
    """Of the vision tower's blocks."""
    vision = config.vision_config
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = getattr(vision, "intermediate_size", None) or round(width * vision.mlp_ratio)
    blocks = getattr(config, "num_vision_blocks", None) or vision.depth
    trained = "vision_tower" in training.trained
    forward, backward = TOWER[trained]
    again = 1 / training.checkpoint_every if trained and training.checkpoint_every else 0
    factors = ((1 + again) * f + b for f, b in zip(forward, backward, strict=True))
    return blocks * patches * sum(f * size for f, size in zip(factors, (width, inner), strict=True))


def loss_bytes(config: PreTrainedConfig, labels: float) -> float:
    """Of the loss, with the head's fp32 gradient, which each chunk adds to."""
    text = config.text_config
    chunks = -(-labels * text.vocab_size * 2 // CHUNK_BYTES)
    return LOGIT_BYTES * labels * text.vocab_size + 8 * chunks * text.vocab_size * text.hidden_size


def float8_bytes(config: PreTrainedConfig, positions: float) -> tuple[float, float]:
    """Of the casts to float8, five bytes for each value that enters a product: by position, and of the weights."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = text.num_key_value_heads * head_dim
    entering = 6 * text.hidden_size + 3 * text.intermediate_size + 2 * keys
    weights = text.hidden_size * (2 * text.hidden_size + 2 * keys + 3 * text.intermediate_size)
    return 5 * text.num_hidden_layers * positions * entering, 5 * text.num_hidden_layers * weights
