"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints with their own processors, as folders."""

from importlib.resources import files
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.qwen_tokenizer import build_qwen_tokenizer

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VOCABULARY = 512  # the first ranks of Qwen's own vocabulary; its control tokens follow
MAX_TOKENS = 16  # of an image
_TEXT = {
    "vocab_size": VOCABULARY + 32,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 4096,
}
_ROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e6}
_VISION = {"depth": 2, "num_heads": 2, "initializer_range": 0.2}


def make_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Qwen's tokenizer cut to its first 512 ranks, loaded from `folder`, where it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    return AutoTokenizer.from_pretrained(build_qwen_tokenizer(folder, VOCABULARY))


def make_processor(family: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int = MAX_TOKENS) -> ProcessorMixin:
    """A family's own processor; images take 4 to `max_tokens` tokens. The templates are the published ones."""
    patch = 16 if family == "qwen3_vl" else 14
    area = (2 * patch) ** 2
    options = {"patch_size": patch, "size": {"shortest_edge": 4 * area, "longest_edge": max_tokens * area}}
    if family == "qwen3_vl":
        options |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    template = "qwen3_vl" if family == "qwen3_vl" else "qwen2_5_vl"
    cls = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}[family]
    video = Qwen3VLVideoProcessor if family == "qwen3_vl" else Qwen2VLVideoProcessor
    return cls(
        image_processor=Qwen2VLImageProcessor(**options),
        tokenizer=tokenizer,
        video_processor=video(**options),
        chat_template=files("trl").joinpath(f"chat_templates/{template}.jinja").read_text("utf8"),
    )


def make_config(family: str, tokenizer: PreTrainedTokenizerBase, **text):
    """Two blocks in each tower; one of 2.5's has windows, one of 3's feeds a deepstack. `text` changes the LLM's."""
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        }.items()
    }
    text = {
        **_TEXT,
        "rope_parameters": dict(_ROPE),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | text
    ids["tie_word_embeddings"] = True
    hidden = text["hidden_size"]
    if family == "qwen2_vl":
        return Qwen2VLConfig(
            text_config=text, vision_config={**_VISION, "embed_dim": 32, "hidden_size": hidden, "mlp_ratio": 2}, **ids
        )
    vision = {**_VISION, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": hidden}
    if family == "qwen2_5_vl":
        vision |= {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    text["rope_parameters"]["mrope_interleaved"] = True
    text["head_dim"] = hidden // text["num_attention_heads"]
    vision |= {"num_position_embeddings": 36, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **ids)


def make_model(
    family: str, tokenizer: PreTrainedTokenizerBase, attention: str = "sdpa", config=None, **text
) -> PreTrainedModel:
    """The same fp32 weights each time, in evaluation mode."""
    cls = {
        "qwen2_vl": Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": Qwen3VLForConditionalGeneration,
    }[family]
    torch.manual_seed(0)
    model = cls._from_config(config or make_config(family, tokenizer, **text), attn_implementation=attention)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model.eval()


def save_qwen_vl(folder: Path, family: str) -> Path:
    """Write a checkpoint with its processor, as a hub repository has them; returns the folder."""
    tokenizer = make_tokenizer(folder.parent / "tokenizer")
    make_model(family, tokenizer).save_pretrained(folder)
    make_processor(family, tokenizer).save_pretrained(folder)
    return folder


def save_text_model(folder: Path, qwen2_vl: Path) -> Qwen2ForCausalLM:
    """Write a Qwen2 of the language model's sizes in a Qwen2-VL's folder; returns it."""
    config = AutoConfig.from_pretrained(qwen2_vl).text_config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(config, name) for name in (*names, "vocab_size", "rms_norm_eps", "initializer_range")}
    rope = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, rope_parameters=rope, tie_word_embeddings=True))
    model.save_pretrained(folder)
    return model
