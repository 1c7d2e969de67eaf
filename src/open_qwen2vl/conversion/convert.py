"""`open-qwen2vl convert`: a checkpoint of the original to a folder for the Auto classes, and back.

config.json, checkpoints/latest-checkpoint.pt (mapped; tensors only)  +  vision weights  +  text model's config
  │ names and shapes are checked against the model on the meta device before anything is written
  ▼
a temporary folder beside OUT_DIR: config.json, model-*.safetensors, processor  ─ rename ─▶  OUT_DIR
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .. import model_folders
from ..files import new_folder
from ..modeling.configuration_open_qwen2vl import OpenQwen2VLConfig
from ..modeling.modeling_open_qwen2vl import OpenQwen2VLForConditionalGeneration
from ..processing import text_formats
from ..processing.processing_open_qwen2vl import OpenQwen2VLProcessor
from .names import (
    check_vision_weights,
    convert_original_tensors,
    read_token_budget,
    read_vision_config,
    restore_original_tensors,
    write_arch_specifier,
)
from .vision_weights import DEFAULT_VISION_WEIGHTS, load_pt, load_safetensors, load_vision_weights

logger = logging.getLogger(__name__)

CHECKPOINT = Path("checkpoints") / "latest-checkpoint.pt"
_MAX_NAMES = 20


@dataclass
class ConversionReport:
    """What a conversion wrote; its text is what the command prints."""

    output: Path
    vision_weights: str  # where the vision tower came from
    image_seq_length: int  # tokens per image
    num_tensors: int  # tensors written
    num_parameters: int  # their elements
    unused: list[str]  # tensors of the sources that the model has no place for

    def __str__(self) -> str:
        """One line a fact."""
        lines = {
            "output": self.output,
            "vision weights": self.vision_weights,
            "tokens per image": self.image_seq_length,
            "tensors": f"{self.num_tensors} ({self.num_parameters:,} parameters)",
            "unused": " ".join([str(len(self.unused)), *self.unused]),
        }
        return "\n".join(f"{name:<18}{value}" for name, value in lines.items())


def convert_checkpoint(
    original: str | Path,
    output: str | Path,
    text_model: str,
    vision_weights: str | None = None,
    vision_heads: int | None = None,
) -> ConversionReport:
    """Convert a checkpoint of the original code.

    Args:
        original (`str` or `Path`): folder with `config.json` and `checkpoints/latest-checkpoint.pt`.
        output (`str` or `Path`): folder to make; it must not exist.
        text_model (`str`): hub id or folder of the language model's config and tokenizer
            (`Qwen/Qwen2.5-1.5B-Instruct`).
        vision_weights (`str`, *optional*): a safetensors or .pt file with timm's names, or a hub or timm id; by
            default the checkpoint's own vision backbone, or timm's release where it has none.
        vision_heads (`int`, *optional*): attention heads of a vision tower that is no released ViT.

    Returns:
        [`ConversionReport`].

    Raises:
        ValueError: if tensors are missing, unknown or of another shape, all of them named; if `output` exists; if
            the vision weights cannot be had.
        FileNotFoundError: if `original` is no such folder.
    """
    output = Path(output)
    budget, tensors, unused = _read_original(Path(original))
    source = vision_weights or (None if "vision_backbone" in tensors else DEFAULT_VISION_WEIGHTS)
    if source is not None:
        unused += [f"vision_backbone.{name} (replaced)" for name in tensors.get("vision_backbone", {})]
        tensors["vision_backbone"], other = load_vision_weights(source)
        unused += [f"{name} (beside the vision tower)" for name in other]
    vision_config = read_vision_config(tensors["vision_backbone"], vision_heads)
    text_config, tokenizer = _load_text_model(text_model)
    processor = _build_processor(tokenizer, budget, vision_config)
    config = OpenQwen2VLConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=processor.image_token_id,
        image_seq_length=budget,
    )
    state, no_place = convert_original_tensors(tensors, config)
    model = _empty_model(config, tokenizer, tensors["llm_backbone"])
    state = _check_tensors(state, model, tensors["llm_backbone"])
    report = ConversionReport(output, source or str(CHECKPOINT), budget, *_count(state.values()), unused + no_place)
    # Saving takes the tensors out of the state shard by shard; with a file's last tensor goes its map.
    del tensors
    with new_folder(output) as folder:
        shard_size = max(1, sum(tensor.nbytes for tensor in state.values()) // 8)
        model.save_pretrained(folder, state_dict=state, max_shard_size=shard_size, save_original_format=False)
        processor.save_pretrained(folder)
    logger.info("not used: %s", ", ".join(report.unused))
    return report


def convert_to_original(
    model_folder: str | Path, output: str | Path, vision_weights: str | None = None
) -> ConversionReport:
    """Write a model's folder in the original's layout.

    Args:
        model_folder (`str` or `Path`): folder with `config.json` and safetensors, of an adapter (which is merged into
            its base), or `output_dir` of a training.
        output (`str` or `Path`): folder to make; it must not exist.
        vision_weights (`str`, *optional*): as in [`convert_checkpoint`]; by default timm's release, which the original
            takes where a checkpoint has no vision backbone. The model's tower is written where it differs from these
            weights or they are given, completed by their last block, final norm and pooling head, which the model
            does not hold. Where that is not possible a warning says so.

    Returns:
        [`ConversionReport`].

    Raises:
        ValueError: if `output` exists, or the vision weights cannot be had.
        FileNotFoundError: if `model_folder` has no weights.
    """
    model_folder, output = Path(model_folders.model_folder(model_folder)), Path(output)
    config, state = load_model(model_folder)
    backbone, other = _backbone_to_write(state, config, vision_weights)
    tensors = restore_original_tensors(state, config, backbone)
    if backbone is None:
        other = [name for name in state if name.startswith("model.vision_tower.")]
    report = ConversionReport(
        output,
        "none written" if backbone is None else vision_weights or DEFAULT_VISION_WEIGHTS,
        config.image_seq_length,
        *_count(tensor for part in tensors.values() for tensor in part.values()),
        other,
    )
    with new_folder(output) as folder:
        settings = _original_settings(config, model_folder.resolve().name)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf8")
        (folder / CHECKPOINT).parent.mkdir()
        torch.save({"model": tensors}, folder / CHECKPOINT)
    return report


def _backbone_to_write(
    state: dict[str, torch.Tensor], config: OpenQwen2VLConfig, vision_weights: str | None
) -> tuple[dict[str, torch.Tensor] | None, list[str]]:
    """Weights that complete the model's tower, and names beside them; None where the original's own are the same."""
    if vision_weights:
        backbone, other = load_vision_weights(vision_weights)
        check_vision_weights(state, config, backbone, vision_weights)
        return backbone, other
    try:
        backbone, _ = load_vision_weights(DEFAULT_VISION_WEIGHTS)
        trained = check_vision_weights(state, config, backbone, DEFAULT_VISION_WEIGHTS)
    except ValueError as error:
        logger.warning(
            "the vision tower is NOT written, and the original will take %s instead: if the tower was trained, or is "
            "another one, give the weights that it started from as --vision-weights (%s)",
            DEFAULT_VISION_WEIGHTS,
            error,
        )
        return None, []
    return (backbone if trained else None), []


def _read_original(folder: Path) -> tuple[int, dict[str, dict[str, torch.Tensor]], list[str]]:
    """Tokens per image, the tensors by part, and the names of what lies beside them."""
    try:
        arch_specifier = json.loads((folder / "config.json").read_text(encoding="utf8"))["model"]["arch_specifier"]
    except (KeyError, TypeError, ValueError):  # no JSON, no such entry, no text
        raise ValueError(f"{folder / 'config.json'}: no model.arch_specifier in it") from None
    checkpoint = load_pt(folder / CHECKPOINT)
    tensors = checkpoint.get("model")
    tensors = dict(tensors) if isinstance(tensors, dict) else {}
    if absent := [part for part in ("projector", "llm_backbone") if not isinstance(tensors.get(part), dict)]:
        raise ValueError(f"{folder / CHECKPOINT}: no {' and no '.join(absent)} in it")
    others = [f"{name} (beside the model)" for name in checkpoint if name != "model"]
    return read_token_budget(arch_specifier), tensors, others


def _original_settings(config: OpenQwen2VLConfig, name: str) -> dict:
    """What the original reads from a checkpoint's config.json."""
    model = {
        "arch_specifier": write_arch_specifier(config.image_seq_length),
        "image_resize_strategy": "resize-naive",
        "llm_backbone_id": "qwen2.5-1.5b-instruct",
        "llm_max_length": 4096,
        "model_id": name,
        "type": "one-stage+7b",
        "vision_backbone_id": "siglip-vit-so400m-384px",
    }
    return {"model": model, "mount_path": "Qwen"}


def load_model(folder: Path) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """Config and tensors of a model's folder, or of an adapter's after merging."""
    if not model_folders.is_adapter(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config, OpenQwen2VLConfig):
            raise ValueError(f"{folder}: model type {config.model_type!r} instead of 'open_qwen2vl'")
        return config, _load_model_folder(folder)
    from ..trainer.lora import merged_model

    model = merged_model(folder, dtype="auto")
    if not isinstance(model.config, OpenQwen2VLConfig):
        raise ValueError(f"{folder}: model type {model.config.model_type!r} instead of 'open_qwen2vl'")
    tied = getattr(model, "all_tied_weights_keys", {})
    return model.config, {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _load_model_folder(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no model*.safetensors")
    return {name: tensor for file in files for name, tensor in load_safetensors(file).items()}


def _load_text_model(source: str) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return AutoConfig.from_pretrained(source, trust_remote_code=False), text_formats.prepare_tokenizer(tokenizer)
    except OSError as error:
        raise ValueError(f"text model {source}: {str(error).strip().splitlines()[0]}") from None


def _build_processor(
    tokenizer: PreTrainedTokenizerBase, image_seq_length: int, vision_config: dict[str, Any]
) -> OpenQwen2VLProcessor:
    """The original's prompt format by default, that of new models as `chat_template="chatml"`."""
    image_size = vision_config["image_size"]
    return OpenQwen2VLProcessor.from_parts(
        SiglipImageProcessorPil(size={"height": image_size, "width": image_size}),
        tokenizer,
        image_seq_length,
        default_template="chat_template_original.jinja",
        patches_per_side=image_size // vision_config["patch_size"],
    )


def _empty_model(config: OpenQwen2VLConfig, tokenizer, language: dict[str, torch.Tensor]):
    """The model on the meta device, in the language model's dtype."""
    dtype = next((tensor.dtype for tensor in language.values()), None)
    with torch.device("meta"):
        model = OpenQwen2VLForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(text_formats.EOS_TOKEN),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[config.image_token_id],
    )
    return model


def _check_tensors(state: dict[str, torch.Tensor], model, language: dict[str, torch.Tensor]) -> dict:
    """The state in the model's order, if every tensor is there, in its shape, and a tied head equals the embedding."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    head = language.get("llm.lm_head.weight")
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
        embedding = language.get("llm.model.embed_tokens.weight")
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise ValueError("lm_head.weight differs from the embedding, but the text model's config ties them")
    if missing := [name for name in expected if name not in state]:
        raise ValueError(f"the checkpoint lacks {_name_some(missing)}")
    if surplus := [name for name in state if name not in expected]:
        raise ValueError(f"the model has no {_name_some(surplus)}")
    shapes = [
        f"{name} {tuple(tensor.shape)} instead of {expected[name]}"
        for name, tensor in state.items()
        if tuple(tensor.shape) != expected[name]
    ]
    if shapes:
        raise ValueError(f"shapes do not fit the text model: {_name_some(shapes)}")
    return {name: state[name] for name in expected}


def _name_some(names: list[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _count(tensors: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Number of tensors and of their elements."""
    sizes = [tensor.numel() for tensor in tensors]
    return len(sizes), sum(sizes)
