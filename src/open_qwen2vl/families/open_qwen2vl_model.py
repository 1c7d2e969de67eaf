"""The model side of Open-Qwen2VL: its parts, its blocks, what a step of it costs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from ..modeling.vision import vision_blocks
from .interface import StepWork, VisionWork


class OpenQwen2VLPackedModel:
    """[`PackedModel`] of Open-Qwen2VL, whose own forward takes packed batches."""

    parts = {"vision_tower": "model.vision_tower.", "projector": "model.multi_modal_projector."}
    block_classes = (
        *(f"{name}DecoderLayer" for name in ("Qwen2", "Qwen3", "Llama", "SmolLM3", "Mistral", "Gemma", "Gemma3")),
        *("SiglipEncoderLayer", "CLIPEncoderLayer", "Dinov2Layer", "Dinov2WithRegistersLayer", "DINOv3ViTLayer"),
        "Siglip2EncoderLayer",
    )
    # Gemma's norms and MLPs are others; SmolLM3 leaves RoPE out of some layers.
    fused_classes = {
        f"{name}{suffix}": operation
        for name in ("Qwen2", "Qwen3", "Llama", "SmolLM3", "Mistral")
        for suffix, operation in (("RMSNorm", "rms_norm"), ("MLP", "swiglu"), ("Attention", "rope"))
    }

    def prepare(self, model: PreTrainedModel, processor: Any = None) -> PreTrainedModel:
        """Switch off the cache, which would join a pack's documents.

        Raises:
            ValueError: for tokens that the tower has not, or a processor that normalises pixels in another way.
        """
        if (image_processor := getattr(processor, "image_processor", None)) is not None:
            _check_normalisation(model.config, image_processor)
        model.config.check_budget(model.config.image_seq_length)
        model.config.text_config.use_cache = False
        return model

    def step_flops(self, config: PreTrainedConfig, work: StepWork, trained: dict[str, int]) -> int:
        """FLOPs that a forward and backward over packed documents need, a multiply-add being two.

        A forward is 2 FLOPs per parameter and position, gradients of the activations 2 more, gradients of the weights
        2 more; what nothing before it needs is left out. The head is counted at every real position, as is usual,
        though only labelled ones are computed. Attention is causal within documents, and full within images; windows
        (Gemma 3) are counted as if documents were no longer.
        """
        text, vision = config.text_config, config.vision_config
        # 6 N per position where it is trained; 4 N where gradients only pass through to the image features.
        language = (6 if trained["language_model"] else 4) * language_model_parameters(text) * work.tokens
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        language += 6 * text.num_hidden_layers * text.num_attention_heads * head_dim * work.squared_lengths
        language += 6 * trained.get("adapter", 0) * work.tokens

        projector_parameters = (vision.hidden_size + 1 + text.hidden_size + 1) * text.hidden_size
        projector_passes = 3 if trained["projector"] else 2 if trained["vision_tower"] else 1
        projector = 2 * projector_passes * projector_parameters * work.vision.tokens

        # A square each; a plan that was made without the model does not know of how many patches.
        patches, squared = work.media * config.tower_length, work.media * config.tower_length**2
        if config.native_resolution:
            patches, squared = work.vision.patches, work.vision.squared
        tower = 2 * vision_parameters(config) * patches
        tower += 4 * config.num_vision_blocks * vision.hidden_size * squared
        return language + projector + (3 if trained["vision_tower"] else 1) * tower

    def vision_work(self, config: PreTrainedConfig, images: float, tokens: float) -> VisionWork:
        """What encoding so many images costs, which take so many positions together."""
        return VisionWork(images * config.patches_per_side**2, images * config.tower_length**2, tokens)

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


def _check_normalisation(config: PreTrainedConfig, image_processor: Any) -> None:
    for name in ("image_mean", "image_std"):
        ours, others = list(getattr(config, name)), list(getattr(image_processor, name))
        if ours != others:
            raise ValueError(f"the model's config has {name} {ours}, and the processor {others}: one of them is wrong")


def language_model_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a text config's model, embeddings and head counted once (1,543,714,304 for Qwen2.5-1.5B)."""
    return _parameters(config, lambda model: model)


def vision_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the vision blocks that run (26 of the 27 of SigLIP-SO400M); embeddings and norm are no blocks."""
    used = config.num_vision_blocks
    return _parameters(config.vision_config, lambda model: vision_blocks(model)[:used], used)


_COUNTED: dict[tuple, int] = {}


def _parameters(config: PreTrainedConfig, part: Callable[[PreTrainedModel], nn.Module], *others: int) -> int:
    """Parameters of a part of a config's model, on meta; remembered, for every step asks for them."""
    key = repr(vars(config)), *others
    if key not in _COUNTED:
        with torch.device("meta"):
            _COUNTED[key] = sum(one.numel() for one in part(AutoModel.from_config(config)).parameters())
    return _COUNTED[key]
