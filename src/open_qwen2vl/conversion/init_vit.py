"""`open-qwen2vl init-vit`: a Qwen2-VL whose vision tower starts from a CLIP or DFN, as the article's did.

MODEL: config, processor, language model   +   perhaps another language model   +   open_clip's image tower
  │ sizes and names are checked before anything is written
  ▼
a temporary folder beside OUTPUT: the model, its processor, init_vit.json  ─ rename ─▶  OUTPUT
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ..data.scoring.clip import load_clip
from ..data.storage.tars import IMAGE_EXTENSIONS, list_files
from ..families.qwen_vl.from_clip import NOT_CARRIED, FoldedNorm, check_sizes, fold_ln_pre, tower_weights
from ..files import new_folder
from ..model_folders import model_folder
from ..processing.images import decode_image
from ..processing.sample_error import SampleError

logger = logging.getLogger(__name__)

RECORD = "init_vit.json"
MOST_IMAGES = 64  # thousands of patches: their mean deviation does not change any more
_SAME_TEXT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "rms_norm_eps", "hidden_act"),
)


@dataclass(frozen=True)
class InitVitReport:
    """What was carried over and what was not; also `init_vit.json` in the output."""

    output: str
    clip: str
    language_model: str
    tensors: int  # of CLIP that the tower has now
    parameters: int  # their elements
    not_carried: dict[str, str]  # tensors of CLIP and what is random here, and why
    ln_pre: FoldedNorm | None  # None where it was left out, or where CLIP has none
    pixels: dict[str, list[float]]  # mean and standard deviation, CLIP's, that the processor now has

    def __str__(self) -> str:
        """One line a fact."""
        fold = self.ln_pre
        lines = {
            "output": self.output,
            "vision tower": f"{self.clip}: {self.tensors} tensors ({self.parameters:,} parameters)",
            "language model": self.language_model,
            "ln_pre": "not folded"
            if fold is None
            else f"folded on {fold.images} images: cosine to CLIP's first stream {fold.cosine:.3f}, "
            f"{fold.cosine_without:.3f} without",
        }
        lines |= {f"not carried: {name}": why for name, why in self.not_carried.items()}
        return "\n".join(f"{name:<36}{value}" for name, value in lines.items())


def init_vit(
    model: str | Path,
    output: str | Path,
    clip: str,
    pretrained: str | None = None,
    language_model: str | None = None,
    images: Sequence[str | Path] = (),
    seed: int = 0,
) -> InitVitReport:
    """Start the vision tower of a Qwen2-VL from an open_clip checkpoint and write the model.

    Args:
        model (`str` or `Path`): Qwen2-VL's folder or hub id; with `language_model` its config and processor suffice.
        output (`str` or `Path`): folder to make, for the Auto classes; it must not exist.
        clip (`str`): name of a model of open_clip, `hf-hub:OWNER/NAME` or `local-dir:FOLDER`.
        pretrained (`str`, *optional*): tag or file of the weights that a name needs.
        language_model (`str`, *optional*): folder or hub id of a Qwen2 whose weights replace those of `model`.
        images (`Sequence[str | Path]`, *optional*): pictures, folders or tars of them; at most `MOST_IMAGES` of them,
            evenly chosen, are shown to CLIP to fold its `ln_pre`, which is left out without them.
        seed (`int`, *optional*, defaults to 0): of the merger's random weights.

    Returns:
        [`InitVitReport`].

    Raises:
        ValueError: for towers or language models of different sizes, all of them named; for a picture that cannot be
            read, or pictures for a CLIP without `ln_pre`; if `output` exists or a checkpoint cannot be had.
    """
    with new_folder(Path(output)) as folder:
        visual, preprocess = _image_tower(clip, pretrained)
        named = f"--clip {clip}" + (f" --pretrained {pretrained}" if pretrained else "")
        config = _read_config(model)
        try:
            check_sizes(visual, config.vision_config)
            weights, left = tower_weights(visual.state_dict(), config.vision_config.temporal_patch_size)
        except ValueError as error:
            raise ValueError(f"{named} for the tower of {model}: {error}") from None
        fold = _fold(weights, visual, preprocess, images, named)
        trained = _load_model(model, config, language_model)
        merger = _new_merger(trained.model.visual, config.vision_config.initializer_range, seed)
        trained.model.visual.load_state_dict(weights | merger)
        processor = AutoProcessor.from_pretrained(model_folder(model), trust_remote_code=False)
        report = InitVitReport(
            output=str(output),
            clip=named.removeprefix("--clip "),
            language_model=str(language_model or model),
            tensors=len(weights),
            parameters=sum(tensor.numel() for tensor in weights.values()),
            not_carried=_reasons(left, fold, seed),
            ln_pre=fold,
            pixels=_give_pixel_statistics(processor, visual.preprocess_cfg),
        )
        trained.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def _image_tower(clip: str, pretrained: str | None) -> tuple[nn.Module, Any]:
    network, preprocess = load_clip(clip, pretrained, "fp32", "cpu", option="--clip")
    return network.visual, preprocess


def _read_config(model: str | Path) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(model_folder(model), trust_remote_code=False)
    if config.model_type != "qwen2_vl":
        raise ValueError(
            f"{model}: model type {config.model_type!r} instead of 'qwen2_vl', the tower nearest to CLIP's"
        )
    return config


def _fold(
    weights: dict[str, torch.Tensor], visual: nn.Module, preprocess: Any, images: Sequence[str | Path], named: str
) -> FoldedNorm | None:
    has_norm = isinstance(visual.ln_pre, nn.LayerNorm)
    if images and not has_norm:
        raise ValueError(f"--images has no effect: {named} has no ln_pre to fold")
    if images:
        return fold_ln_pre(weights, visual, torch.stack([preprocess(image) for image in _read_images(images)]))
    if has_norm:
        logger.warning(
            "ln_pre of CLIP is left out: the blocks get patches of another scale and offset than they learned from; "
            "--images PICTURES folds it into the patch embedding as far as that goes"
        )
    return None


def _read_images(paths: Sequence[str | Path]) -> Iterator[Any]:
    """At most `MOST_IMAGES` pictures, evenly chosen from files, folders and tars."""
    places: list[tuple[Path, str, int, int]] = []  # file, name, offset, size; -1 for all of the file
    for path in map(Path, paths):
        found = []
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix == ".tar":
                found += [(file, *member) for member in list_files(file) if _is_image(member[0])]
            elif _is_image(file.name) or file == path:
                found.append((file, file.name, 0, -1))
        if not found:
            raise ValueError(f"--images {path}: no picture there")
        places += found
    if len(places) > MOST_IMAGES:
        places = [places[i * len(places) // MOST_IMAGES] for i in range(MOST_IMAGES)]
    yield from (_read_image(*place) for place in places)


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _read_image(path: Path, name: str, offset: int, size: int) -> Any:
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    try:
        return decode_image(data)
    except SampleError as error:
        raise ValueError(f"--images {path}, {name}: {error.reason} ({error})") from None


def _load_model(model: str | Path, config: PreTrainedConfig, language_model: str | None) -> PreTrainedModel:
    """MODEL as it is, or an untrained one of its config with another language model's weights."""
    if language_model is None:
        return AutoModelForImageTextToText.from_pretrained(model_folder(model), dtype="auto", trust_remote_code=False)
    text = AutoModelForCausalLM.from_pretrained(model_folder(language_model), dtype="auto", trust_remote_code=False)
    differ = _text_differences(text.config, config)
    if differ:
        raise ValueError(f"--language-model {language_model} does not fit {model}: {', '.join(differ)}")
    whole = AutoModelForImageTextToText.from_config(config, dtype=text.dtype, trust_remote_code=False)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    with contextlib.suppress(OSError):  # none there: the config's ids stay
        # What ends an answer is MODEL's, as its processor is.
        whole.generation_config = GenerationConfig.from_pretrained(model_folder(model))
    return whole


def _text_differences(found: PreTrainedConfig, config: PreTrainedConfig) -> list[str]:
    """What keeps a Qwen2 from being the language model of a Qwen2-VL's config."""
    if found.model_type != "qwen2":
        return [f"model type {found.model_type} instead of qwen2"]
    wanted = config.text_config
    pairs = [(name, getattr(found, name), getattr(wanted, name)) for name in _SAME_TEXT]
    pairs.append(("tie_word_embeddings", found.tie_word_embeddings, config.tie_word_embeddings))
    pairs.append(("rope_theta", *(one.rope_parameters["rope_theta"] for one in (found, wanted))))
    return [f"{name} {one} instead of {other}" for name, one, other in pairs if one != other]


def _new_merger(tower: nn.Module, deviation: float, seed: int) -> dict[str, torch.Tensor]:
    """Random weights, for those of MODEL belong to another tower."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"merger.mlp.{name}": nn.init.normal_(torch.empty(weight.shape), std=deviation, generator=generator)
        if weight.ndim == 2
        else torch.zeros(weight.shape)
        for name, weight in tower.merger.mlp.state_dict().items()
    }


def _give_pixel_statistics(processor: ProcessorMixin, wanted: dict[str, Any]) -> dict[str, list[float]]:
    """The tower has learned from pixels of CLIP's mean and deviation."""
    mean, std = list(wanted["mean"]), list(wanted["std"])
    for part in (processor.image_processor, processor.video_processor):
        part.image_mean, part.image_std = mean, std
    return {"mean": mean, "std": std}


def _reasons(left: list[str], fold: FoldedNorm | None, seed: int) -> dict[str, str]:
    reasons = {name: NOT_CARRIED[name] for name in left if name in NOT_CARRIED}
    if any(name.startswith("ln_pre.") for name in left):
        reasons["ln_pre"] = (
            "left out: no --images"
            if fold is None
            else "division by each patch's own deviation; their mean stands for it"
        )
    return reasons | {"merger.mlp": f"no part of CLIP: random weights (seed {seed})"}
