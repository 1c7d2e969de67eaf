"""The model side of Open-Qwen2VL: its parts, its blocks, what a step of it costs."""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling.configuration_open_qwen2vl import pooled_grid_side
from .interface import StepWork, VisionWork


class OpenQwen2VLPackedModel:
    """[`PackedModel`] of Open-Qwen2VL, whose own forward takes packed batches."""

    parts = {"vision_tower": "model.vision_tower.", "projector": "model.multi_modal_projector."}
    block_classes = ("Qwen2DecoderLayer", "SiglipEncoderLayer")
    fused_classes = {"Qwen2RMSNorm": "rms_norm", "Qwen2MLP": "swiglu", "Qwen2Attention": "rope"}

    def prepare(self, model: PreTrainedModel, processor: Any = None) -> PreTrainedModel:
        """Switch off the cache, which would join a pack's documents; ValueError for tokens that the tower has not."""
        pooled_grid_side(model.config.image_seq_length, model.config.patches_per_side)
        model.config.text_config.use_cache = False
        return model

    def step_flops(self, config: PreTrainedConfig, work: StepWork, trained: dict[str, int]) -> int:
        """FLOPs that a forward and backward over packed documents need, a multiply-add being two.

        A forward is 2 FLOPs per parameter and position, gradients of the activations 2 more, gradients of the weights
        2 more; what nothing before it needs is left out. The head is counted at every real position, as is usual,
        though only labelled ones are computed. Attention is causal within documents, and full within images.
        """
        text, vision = config.text_config, config.vision_config
        # 6 N per position where it is trained; 4 N where gradients only pass through to the image features.
        language = (6 if trained["language_model"] else 4) * language_model_parameters(text) * work.tokens
        language += 6 * text.num_hidden_layers * text.hidden_size * work.squared_lengths
        language += 6 * trained.get("adapter", 0) * work.tokens

        projector_parameters = (vision.hidden_size + 1 + text.hidden_size + 1) * text.hidden_size
        projector_passes = 3 if trained["projector"] else 2 if trained["vision_tower"] else 1
        projector = 2 * projector_passes * projector_parameters * work.vision.tokens

        # Every image is one square; a plan that was made without the model does not know of how many patches.
        patches = config.patches_per_side**2
        tower = 2 * vision_parameters(config) * patches
        tower += 4 * config.num_vision_blocks * vision.hidden_size * patches**2
        return language + projector + (3 if trained["vision_tower"] else 1) * tower * work.media

    def vision_work(self, config: PreTrainedConfig, images: float, tokens: float) -> VisionWork:
        """What encoding so many images costs, which take so many positions together."""
        patches = config.patches_per_side**2
        return VisionWork(images * patches, images * patches**2, tokens)

    def activation_bytes(
        self,
        config: PreTrainedConfig,
        work: StepWork,
        trained: dict[str, int],
        dtype: torch.dtype = torch.float32,
        autocast: bool = False,
        checkpoint_every: int = 0,
    ) -> float:
        """Bytes that the forward pass of a micro-batch keeps for its backward pass, the loss apart."""
        from .open_qwen2vl_memory import language_model_kept, projector_bytes, vision_tower_kept

        language = language_model_kept(config, bool(trained.get("language_model")), dtype, autocast)
        total = language.bytes(work.tokens, checkpoint_every)
        if trained.get("vision_tower"):
            tower = vision_tower_kept(config, dtype, autocast)
            # Both count the block that the backward pass is in, which is one at a time.
            total += tower.bytes(work.media, checkpoint_every) - min(
                language.block * work.tokens, tower.block * work.media
            )
        if work.media and (trained.get("vision_tower") or trained.get("projector")):
            total += work.media * projector_bytes(config, round(work.vision.tokens / work.media), dtype, autocast)
        return total


def language_model_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a Qwen2 text config, embeddings and head counted once (1,543,714,304 for Qwen2.5-1.5B)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    queries, keys_values = heads * head_dim, 2 * config.num_key_value_heads * head_dim
    attention = (hidden + 1) * (queries + keys_values) + queries * hidden
    block = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    return config.num_hidden_layers * block + hidden + config.vocab_size * hidden


def vision_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the vision blocks that run (26 of the 27 of SigLIP-SO400M); embeddings and norm are no blocks."""
    width, inner = config.vision_config.hidden_size, config.vision_config.intermediate_size
    block = 4 * (width + 1) * width + (width + 1) * inner + (inner + 1) * width + 4 * width
    return config.num_vision_blocks * block
