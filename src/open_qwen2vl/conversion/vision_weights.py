"""SigLIP's weights from timm's side: a file, a hub id or a timm id, all under the original's names.

Two layouts are on the hub: timm's own (the tower alone) and open_clip's (the tower as `visual.trunk`, beside a text
tower). Files are mapped, and only tensors are read from them.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# The image tower of google/siglip-so400m-patch14-384 as timm released it, which the original froze.
DEFAULT_VISION_WEIGHTS = "hf-hub:timm/ViT-SO400M-14-SigLIP-384"
_HUB_FILES = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def load_vision_weights(source: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors of a SigLIP vision tower under the original's names, and the names of others in the file.

    From a safetensors or .pt file (timm's names, open_clip's, or a checkpoint of the original), a hub id
    (`hf-hub:OWNER/NAME` or `OWNER/NAME`), or a timm id (`vit_so400m_patch14_siglip_384`).
    """
    path = Path(source) if Path(source).exists() else _download(source)
    tensors = load_safetensors(path) if path.suffix == ".safetensors" else load_pt(path)
    if isinstance(tensors.get("model"), dict):
        tensors = tensors["model"].get("vision_backbone", {})
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    for prefix in ("featurizer.", "visual.trunk.", ""):
        if f"{prefix}pos_embed" in tensors:
            tower = {name: t for name, t in tensors.items() if name.startswith(prefix)}
            named = {"featurizer." + name.removeprefix(prefix): t for name, t in tower.items()}
            return named, [name for name in tensors if name not in tower]
    raise ValueError(f"{source}: no vision tower with timm's names (pos_embed, blocks.0...) in it")


def load_pt(path: Path) -> dict:
    """Map a file of `torch.save`, of which nothing but tensors and containers is unpickled; ValueError for another."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, pickle and torch each have their own
        raise ValueError(f"{path}: not a checkpoint of tensors ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a checkpoint of tensors (it holds a {type(content).__name__})")
    return content


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Map a safetensors file; ValueError for another."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _download(source: str) -> Path:
    """The weights' file of a hub or timm id."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repo = source.removeprefix("hf-hub:")
    if "/" not in repo:
        repo = _hub_id_of_timm(repo)
    for name in _HUB_FILES:
        try:
            return Path(hf_hub_download(repo, name))
        except EntryNotFoundError as error:
            reason = error
        except (OSError, ValueError) as error:
            reason = error
            break
    raise ValueError(f"vision weights {source}: no such file, and {str(reason).strip().splitlines()[0]}")


def _hub_id_of_timm(name: str) -> str:
    try:
        from timm.models import get_pretrained_cfg

        config = get_pretrained_cfg(name)
    except ImportError:
        raise ValueError(f"vision weights {name}: no such file; timm ids need the package timm") from None
    except RuntimeError:
        config = None
    if config is None or not config.hf_hub_id:
        raise ValueError(f"vision weights {name}: neither a file nor a model that timm knows")
    return config.hf_hub_id
