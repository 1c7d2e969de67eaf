"""Qwen2-VL's vision tower from a CLIP's: open_clip's `VisionTransformer` under Qwen2-VL's names.

    conv1, shared out to the frames of a patch ─► patch_embed            ln_post ─► merger.ln_q
    transformer.resblocks.i ─► blocks.i                                  ln_pre, on pictures ─► patch_embed, blocks.0
    class_embedding, positional_embedding, proj ─► nothing of the tower: `NOT_CARRIED` says why

With the class token, the positions and `ln_pre` taken out of CLIP and the rotation out of Qwen2-VL, both compute the
same.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

NOT_CARRIED = {
    "class_embedding": "the tower has no class token",
    "positional_embedding": "positions are 2D-RoPE, which the blocks have to learn",
    "proj": "it leads to CLIP's common space with texts; the merger leads to the language model",
}
_NAMES = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"^ln_post\.", "merger.ln_q."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_TOWER = re.compile(
    r"patch_embed\.proj\.weight|(merger\.ln_q|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]))\.(weight|bias)"
)
_PATCHES, _FIRST_BIAS = "patch_embed.proj.weight", "blocks.0.attn.proj.bias"


@dataclass(frozen=True)
class FoldedNorm:
    """How well the tower's first stream follows CLIP's, as cosines over channels, centred as the next norm does."""

    images: int  # pictures that it was measured on
    deviation: float  # mean standard deviation of CLIP's patches before `ln_pre`
    cosine: float  # with `ln_pre` folded
    cosine_without: float  # without it


def check_sizes(visual: nn.Module, config: PreTrainedConfig) -> None:
    """Refuse, by name, a CLIP tower whose blocks are not those of a Qwen2-VL vision config; a `ValueError`."""
    if not hasattr(visual, "conv1") or not hasattr(getattr(visual, "transformer", None), "resblocks"):
        raise ValueError(f"its image tower is a {type(visual).__name__}, none of open_clip's VisionTransformer")
    first, (width, channels, side, _) = visual.transformer.resblocks[0], visual.conv1.weight.shape
    found = {
        "depth": len(visual.transformer.resblocks),
        "embed_dim": width,
        "num_heads": first.attn.num_heads,
        "mlp_ratio": first.mlp.c_fc.out_features / width,
        "patch_size": side,
        "in_channels": channels,
        "hidden_act": {"QuickGELU": "quick_gelu", "GELU": "gelu"}.get(type(first.mlp.gelu).__name__, "another"),
    }
    wanted = {name: getattr(config, name) for name in found}
    wrong = [f"{name} {found[name]} instead of {wanted[name]}" for name in found if found[name] != wanted[name]]
    if wrong:
        raise ValueError(f"it does not fit the vision_config: {', '.join(wrong)}")


def tower_weights(clip: Mapping[str, torch.Tensor], frames: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights of `model.visual` from those of a CLIP's `visual`, and the names of those that are not among them.

    All but `merger.mlp`, for which CLIP has nothing. `frames` is `temporal_patch_size`: an image is shown as so many
    equal ones, which together weigh as much as CLIP's one. A tensor that no plain ViT has, as those of layer scales
    and attentional pooling, is a `ValueError`.
    """
    left = [name for name in clip if name in NOT_CARRIED or name.startswith("ln_pre.")]
    weights = {}
    for name in (name for name in clip if name not in left):
        new = name
        for pattern, replacement in _NAMES:
            new = re.sub(pattern, replacement, new)
        weights[new] = clip[name].clone()
    if unknown := [name for name in weights if not _TOWER.fullmatch(name)]:
        raise ValueError(f"Qwen2-VL's tower has no place for {', '.join(unknown[:20])}")
    weights[_PATCHES] = _over_frames(weights[_PATCHES], frames)
    return weights, left


@torch.no_grad()
def fold_ln_pre(weights: dict[str, torch.Tensor], visual: nn.Module, pixels: torch.Tensor) -> FoldedNorm:
    """Put what can be of `ln_pre` into the tower's weights, which are changed.

    Centring over channels goes into the patch embedding exactly. The division is by each patch's own deviation there
    and by their mean here. What is the same for all patches, the norm's bias and the mean position, joins the stream
    with the first attention, for the embedding has no bias. What the blocks then see differs most in the positions.

    Args:
        weights (`dict`): of [`tower_weights`].
        visual (`nn.Module`): open_clip's tower, with `ln_pre`.
        pixels (`torch.Tensor`): float `(images, 3, H, W)`, as CLIP's own preprocessing makes them.
    """
    embedding, norm, positions = visual.conv1.weight, visual.ln_pre, visual.positional_embedding[1:]
    # (images, 3, H, W) -> (images, patches, width)
    patches = visual.conv1(pixels).flatten(2).transpose(1, 2)
    shown = patches + positions
    deviation = shown.std(-1, correction=0).mean()
    scale = norm.weight / deviation
    constant = scale * _centred(positions.mean(0)) + norm.bias
    frames = weights[_PATCHES].shape[2]
    weights[_PATCHES] = _over_frames(scale[:, None, None, None] * (embedding - embedding.mean(0)), frames)
    weights[_FIRST_BIAS] += constant
    wanted = norm(shown)
    cosines = (_cosine(wanted, stream) for stream in (scale * _centred(patches) + constant, patches))
    return FoldedNorm(len(pixels), float(deviation), *cosines)


def _over_frames(embedding: torch.Tensor, frames: int) -> torch.Tensor:
    """`(width, 3, P, P)` to `(width, 3, frames, P, P)`."""
    return (embedding / frames)[:, :, None].repeat(1, 1, frames, 1, 1)


def _centred(stream: torch.Tensor) -> torch.Tensor:
    return stream - stream.mean(-1, keepdim=True)


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(_centred(one), _centred(other), dim=-1).mean())
