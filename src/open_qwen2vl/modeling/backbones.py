"""The two pre-trained backbones that a new model is made of.

This file travels with checkpoints: it imports installed libraries and its siblings only.
"""

import os

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    SiglipVisionModel,
)

# Qwen2.5's own vocabulary has it (id 151655); the original left it unused.
IMAGE_TOKEN = "<|image_pad|>"
# What the processor adds to a vocabulary that has none of them, in its order.
ADDED_TOKENS = ("<|endofchunk|>", "<s>")


def load_backbones(vision: str, text: str, **kwargs) -> tuple[SiglipVisionModel, PreTrainedModel, int]:
    """A SigLIP tower, a language model of the same dtype with a row for every token, and the id of `<|image_pad|>`."""
    kwargs = {"trust_remote_code": False} | kwargs
    vision_config = AutoConfig.from_pretrained(vision, trust_remote_code=kwargs["trust_remote_code"])
    vision_config = getattr(vision_config, "vision_config", vision_config)
    if vision_config.model_type != "siglip_vision_model":
        raise ValueError(f"{vision}: the vision tower must be a SigLIP model, not {vision_config.model_type!r}")
    vocabulary = AutoTokenizer.from_pretrained(text, trust_remote_code=kwargs["trust_remote_code"]).get_vocab()
    if IMAGE_TOKEN not in vocabulary:
        raise ValueError(f"{text}: the tokenizer has no {IMAGE_TOKEN} token, which stands for an image feature")
    language_model = AutoModelForCausalLM.from_pretrained(text, **kwargs)
    if kwargs.get("dtype", kwargs.get("torch_dtype", "auto")) in (None, "auto"):
        # Stored dtypes may differ, and a layer cannot join two.
        kwargs["dtype"] = language_model.dtype
        kwargs.pop("torch_dtype", None)
    vision_tower = SiglipVisionModel.from_pretrained(vision, config=vision_config, **kwargs)
    _make_room(language_model, vocabulary)
    _silence(language_model, vocabulary[IMAGE_TOKEN])
    for backbone in (vision_tower, language_model):
        if os.path.isdir(backbone.config._name_or_path):
            # It would be saved and published; a hub id may stand there, a path of this machine should not.
            backbone.config._name_or_path = ""
    return vision_tower, language_model, vocabulary[IMAGE_TOKEN]


def _make_room(language_model: PreTrainedModel, vocabulary: dict[str, int]) -> None:
    """Grow the embedding where a full vocabulary has no row left for the tokens that the processor adds."""
    needed = max(vocabulary.values()) + 1 + sum(token not in vocabulary for token in ADDED_TOKENS)
    if needed > language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(needed)


@torch.no_grad()
def _silence(language_model: PreTrainedModel, image_token_id: int) -> None:
    """Give the placeholder's row of the head the mean of all others: never the largest logit, whatever the state.

    Servers, as vLLM, read only the weights of `suppress_tokens` and head. The logit is the mean of the others, and its
    probability at most one over their number; training lowers it on, for the placeholder is never a label. Where head
    and embedding are one, nobody misses the row: features stand in its place.
    """
    rows = language_model.get_output_embeddings().weight
    total = rows.sum(0, dtype=torch.float32) - rows[image_token_id].float()
    rows[image_token_id] = (total / (len(rows) - 1)).to(rows.dtype)


def greedy_generation(given: GenerationConfig, image_token_id: int) -> GenerationConfig:
    """Greedy by default, unlike Qwen2.5's own sampling settings, with its token ids; no placeholder is written."""
    return GenerationConfig(
        bos_token_id=given.bos_token_id,
        eos_token_id=given.eos_token_id,
        pad_token_id=given.pad_token_id,
        # Nothing teaches the model not to write a placeholder: as a label it never occurs.
        suppress_tokens=[image_token_id],
    )
