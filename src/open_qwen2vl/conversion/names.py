"""Names of the original's tensors (a prismatic-vlms checkpoint over timm and Qwen2) in this model, both ways.

The original's checkpoint is `{"model": {"vision_backbone": {...}, "projector": {...}, "llm_backbone": {...}}}`; the
vision backbone is there only where it was trained. Its final norm, pooling head and last block have no place here.
Nothing is computed but splitting and joining q, k, v: tensors may be mapped from a file and stay so.
"""

import logging
import math
import re

import torch

from ..modeling.configuration_open_qwen2vl import OpenQwen2VLConfig

logger = logging.getLogger(__name__)

# Attention heads, which no tensor's shape tells, by width of timm's ViTs (1152 is SO400M).
_VISION_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16}
_VISION_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PROJECTOR = {"mlp_projector.0": "linear_1", "mlp_projector.2": "linear_2"}


def convert_original_tensors(
    tensors: dict[str, dict[str, torch.Tensor]], config: OpenQwen2VLConfig
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dict of a checkpoint's `"model"` entry, and the names of tensors that this model has no place for."""
    convert = {"vision_backbone": _vision, "projector": _projector, "llm_backbone": _language}
    state, unused = {}, []
    for part, entries in tensors.items():
        if part not in convert:
            raise ValueError(f"the checkpoint has an unknown part {part!r}; known are {', '.join(convert)}")
        for name, tensor in entries.items():
            converted = convert[part](name, tensor, config)
            state.update(converted)
            if not converted:
                unused.append(f"{part}.{name}")
    return state, unused


def restore_original_tensors(
    state: dict[str, torch.Tensor], config: OpenQwen2VLConfig, vision_backbone: dict[str, torch.Tensor] | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """The other way: this model's tensors under the original's names, a checkpoint's `"model"` entry.

    A whole `vision_backbone` gives what this model does not hold (last block, final norm, pooling head); without one
    there is none in the entry: the original cannot load a part of it.
    """
    projector, language = "model.multi_modal_projector.", "model.language_model."
    parts = {
        "projector": {
            f"{theirs}.{kind}": state[f"{projector}{ours}.{kind}"]
            for theirs, ours in _PROJECTOR.items()
            for kind in ("weight", "bias")
        },
        "llm_backbone": {
            "llm.model." + name.removeprefix(language): tensor
            for name, tensor in state.items()
            if name.startswith(language)
        },
    }
    head = state.get("lm_head.weight", state[language + "embed_tokens.weight"])
    parts["llm_backbone"]["llm.lm_head.weight"] = head
    if vision_backbone is not None:
        parts["vision_backbone"] = _restore_vision(state, config, vision_backbone)
    return parts


def check_vision_weights(
    state: dict[str, torch.Tensor], config: OpenQwen2VLConfig, vision_backbone: dict[str, torch.Tensor], source: str
) -> bool:
    """Whether the model's tower differs from weights that complete it; a ValueError if those are of another tower."""
    differs, given = False, set()
    for name, tensor in vision_backbone.items():
        for ours, part in _vision(name, tensor, config).items():
            given.add(ours)
            if ours not in state or state[ours].numel() != part.numel():
                raise ValueError(f"{source}: {name} does not fit the model's vision tower")
            own = state[ours]
            differs = differs or not torch.equal(own, part.reshape(own.shape).to(own.dtype))
    if missing := [name for name in state if name.startswith("model.vision_tower.") and name not in given]:
        raise ValueError(f"{source}: it has nothing for {missing[0]}")
    return differs


def _restore_vision(state, config: OpenQwen2VLConfig, vision_backbone) -> dict[str, torch.Tensor]:
    restored = {}
    for name, tensor in vision_backbone.items():
        parts = [state[ours] for ours in _vision(name, tensor, config)]
        restored[name] = torch.cat(parts).reshape(tensor.shape) if parts else tensor
    return restored


def read_token_budget(arch_specifier: str) -> int:
    """Tokens per image by `no-align+avgpool` (144) or `full-align+729-avgpool` of an original checkpoint's config."""
    match = re.fullmatch(r"[\w-]+\+(?:(\d+)-)?avgpool", arch_specifier)
    if match is None:
        raise ValueError(f"arch_specifier {arch_specifier!r} is not of the form STAGE+avgpool or STAGE+TOKENS-avgpool")
    return int(match[1] or 144)


def write_arch_specifier(image_seq_length: int) -> str:
    """The original's name for a token budget, the reverse of [`read_token_budget`]."""
    known = {144: "no-align+avgpool", 729: "full-align+729-avgpool"}
    return known.get(image_seq_length, f"no-align+{image_seq_length}-avgpool")


def read_vision_config(vision_backbone: dict[str, torch.Tensor], num_attention_heads: int | None = None) -> dict:
    """Arguments of a `SiglipVisionConfig` from the tensors (`featurizer...`); heads by width, shapes do not tell."""
    try:
        patch = vision_backbone["featurizer.patch_embed.proj.weight"].shape[-1]
        patches, width = vision_backbone["featurizer.pos_embed"].shape[-2:]
        intermediate = vision_backbone["featurizer.blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"the vision weights have no {error.args[0].removeprefix('featurizer.')}") from None
    grid = math.isqrt(patches)
    if grid * grid != patches:
        raise ValueError(f"pos_embed has {patches} positions, which make no square grid of patches")
    blocks = {name.split(".")[2] for name in vision_backbone if name.startswith("featurizer.blocks.")}
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": num_attention_heads or _guess_heads(width),
        "image_size": grid * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }


def _guess_heads(width: int) -> int:
    if width in _VISION_HEADS:
        return _VISION_HEADS[width]
    # Narrower than any released ViT: a toy, of which the heads are guessed and the guess is told.
    if width < 192 and width % 16 == 0:
        logger.warning("vision tower of width %d: assuming %d heads; --vision-heads sets them", width, width // 16)
        return width // 16
    raise ValueError(f"unknown number of heads of a vision tower of width {width}: give it with --vision-heads")


def _projector(name: str, tensor: torch.Tensor, config: OpenQwen2VLConfig) -> dict[str, torch.Tensor]:
    layer, _, kind = name.rpartition(".")
    if layer not in _PROJECTOR:
        raise ValueError(f"unknown tensor projector.{name}")
    return {f"model.multi_modal_projector.{_PROJECTOR[layer]}.{kind}": tensor}


def _language(name: str, tensor: torch.Tensor, config: OpenQwen2VLConfig) -> dict[str, torch.Tensor]:
    if name == "llm.lm_head.weight":
        # Saved beside the embedding that it is tied to.
        return {} if config.tie_word_embeddings else {"lm_head.weight": tensor}
    if not name.startswith("llm.model."):
        raise ValueError(f"unknown tensor llm_backbone.{name}")
    return {"model.language_model." + name.removeprefix("llm.model."): tensor}


def _vision(name: str, tensor: torch.Tensor, config: OpenQwen2VLConfig) -> dict[str, torch.Tensor]:
    prefix, timm_name = "model.vision_tower.", name.removeprefix("featurizer.")
    if timm_name.startswith(("attn_pool.", "norm.")):
        return {}
    if timm_name == "pos_embed":
        return {prefix + "embeddings.position_embedding.weight": tensor[0]}
    if timm_name.startswith("patch_embed.proj."):
        return {prefix + timm_name.replace("patch_embed.proj", "embeddings.patch_embedding"): tensor}
    if not timm_name.startswith("blocks."):
        raise ValueError(f"unknown tensor vision_backbone.{name}")
    _, block, rest = timm_name.split(".", 2)
    if int(block) >= config.num_vision_blocks:
        return {}
    target, (layer, kind) = f"{prefix}encoder.layers.{block}.", rest.rsplit(".", 1)
    if layer == "attn.qkv":
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{target}self_attn.{part}_proj.{kind}": chunk for part, chunk in parts}
    if layer not in _VISION_BLOCK:
        raise ValueError(f"unknown tensor vision_backbone.{name}")
    return {f"{target}{_VISION_BLOCK[layer]}.{kind}": tensor}
