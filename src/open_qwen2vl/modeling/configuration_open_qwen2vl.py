"""Configuration of Open-Qwen2VL: a vision tower, an average-pool MLP projector and a language model.

The paper's are SigLIP and Qwen2.5; which others may take their places is said here, and refused by name.

This file travels with checkpoints (`trust_remote_code`): it imports transformers and nothing of this package.
"""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

VISION_DEFAULTS = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
TEXT_DEFAULTS = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}
NATIVE_RESOLUTION = "siglip2_vision_model"  # SigLIP 2 NaFlex: images keep their shape
# What runs packed exactly as alone, with its image features at every position of an image: tests try each.
_SQUARES = ("siglip_vision_model", "clip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit")
VISION_TYPES = (*_SQUARES, NATIVE_RESOLUTION)
TEXT_TYPES = ("qwen2", "qwen3", "llama", "smollm3", "mistral", "gemma", "gemma3_text")


@strict
class OpenQwen2VLConfig(PreTrainedConfig):
    r"""Configuration of an [`OpenQwen2VLForConditionalGeneration`] (arXiv 2504.00595, section 2).

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            The vision tower, of a type in `VISION_TYPES`; defaults to SigLIP-SO400M/14 at 384 px. `num_hidden_layers`
            counts all blocks of the backbone, also those that `vision_feature_layer` leaves out of the model.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            The language model, of a type in `TEXT_TYPES`; defaults to Qwen2.5-1.5B.
        vision_feature_layer (`int`, *optional*, defaults to -2):
            Index into the hidden states of the vision tower (0 = embeddings). Later blocks are neither built nor run.
        image_token_id (`int`, *optional*, defaults to 151655):
            Placeholder of one image feature (`<|image_pad|>`).
        image_seq_length (`int`, *optional*, defaults to 144):
            Tokens an image takes unless a call says otherwise: a square number up to the tower's patch grid. Of a
            tower of native resolution the most that an image takes, any number.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the projector (the exact GELU).
        image_mean (`list[float]`, *optional*):
            Mean of the tower's normalisation by channel, of values between 0 and 1; SigLIP's where not given.
        image_std (`list[float]`, *optional*):
            Standard deviation, likewise.

    Raises:
        ValueError: for a backbone that cannot take its place, if `image_seq_length` is no square number between 1 and
            the patch grid, or `vision_feature_layer` is not a layer of the tower.
    """

    model_type = "open_qwen2vl"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_feature_layer: int = -2
    image_token_id: int = 151655
    image_seq_length: int = 144
    projector_hidden_act: str = "gelu"
    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        # transformers' own `SubConfigSpec` came after 5.19, which vLLM asks for.
        self.vision_config = _sub_config(self.vision_config, VISION_DEFAULTS)
        self.text_config = _sub_config(self.text_config, TEXT_DEFAULTS)
        super().__post_init__(**kwargs)
        check_vision_config(self.vision_config)
        check_text_config(self.text_config)
        # Tying is a property of the language model; the top level repeats it because loading looks for it there.
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self.check_budget(self.image_seq_length)
        layers = self.vision_config.num_hidden_layers
        if not -layers - 1 <= self.vision_feature_layer <= layers:
            raise ValueError(
                f"vision_feature_layer={self.vision_feature_layer} is not a layer of a tower of {layers} blocks"
            )

    @property
    def native_resolution(self) -> bool:
        """Whether images keep their shape and take tokens by it."""
        return self.vision_config.model_type == NATIVE_RESOLUTION

    def check_budget(self, image_seq_length: int) -> None:
        """Refuse, by a `ValueError`, a number of tokens that an image cannot take."""
        if not self.native_resolution:
            pooled_grid_side(image_seq_length, self.patches_per_side)
        elif image_seq_length < 1:
            raise ValueError(f"image_seq_length={image_seq_length} must be at least 1")

    @property
    def patches_per_side(self) -> int:
        """Side of the tower's square patch grid (27 for SigLIP-SO400M/14 at 384 px), of its positions' if native."""
        if self.native_resolution:
            return math.isqrt(self.vision_config.num_patches)
        return one_side(self.vision_config.image_size) // one_side(self.vision_config.patch_size)

    @property
    def tower_length(self) -> int:
        """What the tower's blocks see of an image: patches behind a class token and registers, where there are any."""
        has_class_token = self.vision_config.model_type not in ("siglip_vision_model", NATIVE_RESOLUTION)
        registers = getattr(self.vision_config, "num_register_tokens", 0)
        return has_class_token + registers + self.patches_per_side**2

    @property
    def num_vision_blocks(self) -> int:
        """Number of vision blocks that are built and run (26 of SigLIP-SO400M's 27)."""
        return self.vision_feature_layer % (self.vision_config.num_hidden_layers + 1)


def _sub_config(given: dict[str, Any] | PreTrainedConfig | None, defaults: dict[str, Any]) -> PreTrainedConfig:
    """A config as it is, or one of a dict; the defaults are those of no dict at all, and give a dict its type."""
    if isinstance(given, PreTrainedConfig):
        return given
    values = defaults if given is None else {"model_type": defaults["model_type"], **given}
    return AutoConfig.for_model(**values)


def one_side(size: int | list[int] | tuple[int, ...]) -> int:
    """The side of a square in pixels, which some configs write twice; a ValueError if it is none."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"a vision tower of {'x'.join(map(str, size))} pixels: images and patches must be squares")
    return sides.pop()


def check_vision_config(vision: PreTrainedConfig, name: str = "vision_config") -> None:
    """Refuse, by its name, a vision tower that the model has no place for."""
    if vision.model_type not in VISION_TYPES:
        raise ValueError(
            f"{name}: {vision.model_type!r} cannot be the vision tower; these can: {', '.join(VISION_TYPES)}"
        )


def check_text_config(text: PreTrainedConfig, name: str = "text_config") -> None:
    """Refuse, by its name, a language model that would not run as it was trained, or not packed as alone."""
    if text.model_type not in TEXT_TYPES:
        raise ValueError(
            f"{name}: {text.model_type!r} cannot be the language model; these can: {', '.join(TEXT_TYPES)}"
        )
    for option in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if getattr(text, option, None):
            raise ValueError(
                f"{name}: a language model with {option} is not supported, its attention or loss is another"
            )


def pooled_grid_side(image_seq_length: int, patches_per_side: int) -> int:
    """Side of the pooled grid for a token budget.

    Args:
        image_seq_length (`int`): tokens an image shall take.
        patches_per_side (`int`): side of the vision tower's patch grid.

    Returns:
        `int`: `sqrt(image_seq_length)`.

    Raises:
        ValueError: if the budget is no square number between 1 and `patches_per_side ** 2`.
    """
    side = math.isqrt(max(image_seq_length, 0))
    if side * side != image_seq_length or not 1 <= side <= patches_per_side:
        raise ValueError(
            f"image_seq_length={image_seq_length} must be a square number between 1 and {patches_per_side**2} "
            f"(the vision tower has {patches_per_side}x{patches_per_side} patches)"
        )
    return side


# `save_pretrained` writes this as auto_map, for readers with trust_remote_code=True and without this package.
OpenQwen2VLConfig.register_for_auto_class("AutoConfig")
# `transformers serve` finds classes and what they take by these tables of names, which `register` does not reach.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault("open_qwen2vl", "OpenQwen2VLForConditionalGeneration")

__all__ = ["OpenQwen2VLConfig"]
