"""Tiny random backbones of every kind that a model can be made of, each as the Hub has it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPModel,
    DINOv3ViTImageProcessor,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipImageProcessor,
    SiglipModel,
)

BLOCKS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SQUARE = {"image_size": 32, "patch_size": 8}
_INNER = {"intermediate_size": 48}
_DINO = {**BLOCKS, **SQUARE, "layerscale_value": 0.5, "initializer_range": 0.2}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# Options of the tower's config and its image processor; with those of the text tower a whole CLIP or SigLIP.
VISION = {
    "siglip_vision_model": ({**BLOCKS, **SQUARE, **_INNER}, SiglipImageProcessor(size={"height": 32, "width": 32})),
    "clip_vision_model": (
        {**BLOCKS, **SQUARE, **_INNER},
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    ),
    # Its own processor makes images smaller than the config's, as the Hub's does.
    "dinov2": (
        {**_DINO, "mlp_ratio": 2},
        BitImageProcessor(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16}, **IMAGENET),
    ),
    "dinov2_with_registers": (
        {**_DINO, "mlp_ratio": 2, "num_register_tokens": 2},
        BitImageProcessor(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16}, **IMAGENET),
    ),
    "dinov3_vit": (
        {**_DINO, **_INNER, "num_register_tokens": 4},
        DINOv3ViTImageProcessor(size={"height": 32, "width": 32}),
    ),
    "siglip2_vision_model": (
        {**BLOCKS, **_INNER, "patch_size": 8, "num_patches": 16},
        Siglip2ImageProcessor(patch_size=8, max_num_patches=24),
    ),
}
WHOLE = {"siglip_vision_model": SiglipModel, "clip_vision_model": CLIPModel, "siglip2_vision_model": Siglip2Model}
_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
}
# As on the Hub: heads that are wider together than the model, windows (here shorter than a document), no tied head.
TEXT = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "smollm3": {"tie_word_embeddings": True, "no_rope_layers": [1, 0]},
    "mistral": {"head_dim": 12, "sliding_window": 5},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
}


# Each once with a partner: what stands between the two does not look at either's kind. Native resolution apart.
_ALL = [("siglip_vision_model", text) for text in TEXT] + [(vision, "llama") for vision in [*VISION][1:-1]]
WINDOWED, REGISTERED = ("siglip_vision_model", "gemma3_text"), ("dinov3_vit", "llama")


def pairs(*quick: tuple[str, str]) -> list[Any]:
    """Parameters `vision, text` of a test; those that are not quick are slow."""
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in _ALL]


def save(folder: Path, kind: str, tokenizer: Any) -> str:
    """A backbone of either side."""
    return save_vision(folder, kind) if kind in VISION else save_text(folder, kind, tokenizer)


def save_vision(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> str:
    """A tower with its image processor; CLIP's and SigLIP's within the whole model."""
    options, image_processor = VISION[kind]
    torch.manual_seed(0)
    if kind in WHOLE:
        text = {**BLOCKS, **_INNER, "vocab_size": 16, "max_position_embeddings": 8}
        config = WHOLE[kind].config_class(vision_config=options, text_config=text, projection_dim=16)
        model = WHOLE[kind](config)
    else:
        model = AutoModel.from_config(AutoConfig.for_model(kind, **options))
    model.to(dtype).save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return str(folder)


def save_text(folder: Path, kind: str, tokenizer: Any, rows: int = 0, dtype: torch.dtype = torch.float32) -> str:
    """A language model with a tokenizer, and so many rows of its embedding beyond the vocabulary."""
    torch.manual_seed(1)
    ids = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer) + rows, **{**_TEXT, **ids, **TEXT[kind]})
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def with_own_start(tokenizer: Any, token: str) -> Any:
    """A tokenizer that begins every text with a token, as Llama 3's and Gemma's do."""
    special = [(token, tokenizer.convert_tokens_to_ids(token))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{token} $A", special_tokens=special)
    return tokenizer
