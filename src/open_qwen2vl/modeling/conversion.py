"""Names of the original's tensors (a prismatic-vlms checkpoint over timm and Qwen2) in this model.

The original's checkpoint is `{"model": {"vision_backbone": {...}, "projector": {...}, "llm_backbone": {...}}}`; the
vision backbone is there only where it was trained. Its final norm, pooling head and last block have no place here.
"""

import torch

from .configuration_open_qwen2vl import OpenQwen2VLConfig

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
    """Rename the original's tensors to this model's.

    Args:
        tensors (`dict[str, dict[str, torch.Tensor]]`): the checkpoint's `"model"` entry.
        config (`OpenQwen2VLConfig`): configuration of the model that will take them.

    Returns:
        `tuple[dict[str, torch.Tensor], list[str]]`: the state dict, and the names of tensors that this model has no
        place for.

    Raises:
        ValueError: for a part or a tensor of an unknown name.
    """
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
