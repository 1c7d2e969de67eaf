"""The two pre-trained backbones that a new model is made of.

This file travels with checkpoints: it imports installed libraries and its siblings only.
"""

import difflib
import logging
import os
import re
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from .configuration_open_qwen2vl import check_text_config, check_vision_config
from .vision import OpenQwen2VLMultiModalProjector, truncate_vision_tower

logger = logging.getLogger(__name__)

# In Qwen2.5's own vocabulary (id 151655); the original left it unused.
IMAGE_TOKEN = "<|image_pad|>"
EOS_TOKEN = "<|im_end|>"
# What the processor adds to a vocabulary that has none of them, in its order (processing/text_formats.py).
ADDED_TOKENS = (IMAGE_TOKEN, "<|im_start|>", EOS_TOKEN, "<|endofchunk|>", "<s>")
# What of the options of a model's `from_pretrained` says where files lie.
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
_OPTIONS = (*_HUB_OPTIONS, "image_seq_length", "dtype", "attn_implementation", "device_map", "quantization_config")
_UNEXPECTED = re.compile("unexpected keyword argument '(.+)'")


def load_backbones(vision: str, text: str, **kwargs) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, Any]]:
    """A vision tower, a language model of the same dtype with a row for every token, and what else a config says of
    them: `image_token_id`, `image_mean` and `image_std`.
    """
    kwargs = {"trust_remote_code": False} | kwargs
    _check_dtype(kwargs)
    places = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    vision_config = AutoConfig.from_pretrained(vision, **places)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    check_vision_config(vision_config, vision)
    text_config = AutoConfig.from_pretrained(text, **places)
    check_text_config(text_config, text)
    _check_options(kwargs, vision_config, text_config)
    images = AutoImageProcessor.from_pretrained(vision, **places)
    tokens = _token_ids(AutoTokenizer.from_pretrained(text, **places))
    language_model = _load(AutoModelForCausalLM, text, **kwargs)
    if kwargs.get("dtype", kwargs.get("torch_dtype", "auto")) in (None, "auto"):
        # Stored dtypes may differ, and a layer cannot join two.
        kwargs["dtype"] = language_model.dtype
        kwargs.pop("torch_dtype", None)
        _tell_dtype(vision_config, language_model)
    vision_tower = _load(AutoModel, vision, config=vision_config, **kwargs)
    if max(tokens.values()) >= language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(max(tokens.values()) + 1)
    _silence(language_model, tokens[IMAGE_TOKEN])
    language_model.generation_config = _greedy_generation(language_model.generation_config, tokens)
    for backbone in (vision_tower, language_model):
        if os.path.isdir(backbone.config._name_or_path):
            # It would be saved and published; a hub id may stand there, a path of this machine should not.
            backbone.config._name_or_path = ""
    values = {"image_mean": list(images.image_mean), "image_std": list(images.image_std)}
    return vision_tower, language_model, {"image_token_id": tokens[IMAGE_TOKEN], **values}


def _check_dtype(kwargs: dict[str, Any]) -> None:
    for name in ("dtype", "torch_dtype"):
        given = kwargs.get(name)
        if isinstance(given, str) and given != "auto" and not isinstance(getattr(torch, given, None), torch.dtype):
            raise ValueError(f"{name} is {given!r}, no type of torch, as float32 or bfloat16, and not auto")


def _check_options(kwargs: dict[str, Any], *configs: PreTrainedConfig) -> None:
    for name in kwargs:
        if name not in (*_OPTIONS, "torch_dtype") and any(hasattr(config, name) for config in configs):
            raise TypeError(f"{name!r} is of a backbone's config, and options go to both: set it in its config.json")


def _load(kind: type, name: str, **kwargs) -> PreTrainedModel:
    """A backbone; what neither `from_pretrained` nor its config knows of the options is a `TypeError` of ours."""
    try:
        return kind.from_pretrained(name, **kwargs)
    except TypeError as error:
        unknown = _UNEXPECTED.search(str(error))
        if unknown is None or unknown[1] not in kwargs:
            raise
        near = difflib.get_close_matches(unknown[1], _OPTIONS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise TypeError(f"from_vision_text_pretrained knows no option {unknown[1]!r}{hint}") from None


def put_together(model: Any, vision_tower: PreTrainedModel, language_model: PreTrainedModel) -> Any:
    """A model on meta with the modules of two loaded backbones in place of its own, and a new projector."""
    model.model.vision_tower = truncate_vision_tower(vision_tower, model.config)
    model.model.language_model = language_model.model
    model.lm_head = language_model.lm_head
    projector = OpenQwen2VLMultiModalProjector(model.config)
    projector.apply(model._init_weights)
    model.model.multi_modal_projector = projector.to(language_model.device, language_model.dtype)
    model.generation_config = language_model.generation_config
    return model


def _token_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of all tokens after those that the processor adds."""
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in ADDED_TOKENS if token not in vocabulary], special_tokens=True)
    return tokenizer.get_vocab()


def _tell_dtype(vision: PreTrainedConfig, language_model: PreTrainedModel) -> None:
    stored = str(vision.dtype or "").removeprefix("torch.")
    chosen = str(language_model.dtype).removeprefix("torch.")
    if stored and stored != chosen:
        logger.warning("the vision tower is stored in %s and loaded in %s, as the language model is", stored, chosen)


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


def _greedy_generation(given: GenerationConfig, tokens: dict[str, int]) -> GenerationConfig:
    """Greedy by default, unlike Qwen2.5's own sampling settings, with its token ids; no placeholder is written."""
    ends = given.eos_token_id if isinstance(given.eos_token_id, list) else [given.eos_token_id]
    # Every answer that this model is taught ends so, whatever ended those of the language model.
    ends = [*dict.fromkeys([*(end for end in ends if end is not None), tokens[EOS_TOKEN]])]
    return GenerationConfig(
        bos_token_id=given.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=given.pad_token_id,
        # Nothing teaches the model not to write a placeholder: as a label it never occurs.
        suppress_tokens=[tokens[IMAGE_TOKEN]],
    )
