"""A tiny CLIP of open_clip whose image tower fits the tiny Qwen2-VL of tests/qwen_vl.py."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import nn

VISION = {"image_size": 56, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14, "mlp_ratio": 2}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
PIXELS = {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}


def make_clip(**vision) -> open_clip.CLIP:
    """Random weights, the norm before the blocks included; `vision` changes its settings."""
    torch.manual_seed(0)
    quick = vision.pop("quick_gelu", True)
    clip = open_clip.CLIP(embed_dim=16, quick_gelu=quick, vision_cfg=VISION | vision, text_cfg=TEXT)
    if isinstance(clip.visual.ln_pre, nn.LayerNorm):
        nn.init.uniform_(clip.visual.ln_pre.weight, 0.5, 1.5)
        nn.init.normal_(clip.visual.ln_pre.bias, std=0.1)
    return clip.eval()


def save_clip(folder: Path, **vision) -> str:
    """The name by which open_clip loads it."""
    folder.mkdir()
    config = {"embed_dim": 16, "quick_gelu": vision.get("quick_gelu", True), "text_cfg": TEXT}
    config["vision_cfg"] = VISION | {name: value for name, value in vision.items() if name != "quick_gelu"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PIXELS}))
    save_file(make_clip(**vision).state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"
