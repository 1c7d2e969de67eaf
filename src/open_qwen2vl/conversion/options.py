"""Options of the commands `convert`, `export` and `init-vit`."""

from dataclasses import dataclass
from typing import Literal

from ..options import option


@dataclass(frozen=True)
class ConvertOptions:
    """What is converted, and how: the options of `open-qwen2vl convert`.

    Raises:
        ValueError: for options that do not go together.
    """

    source: str = option(
        help="holds config.json and checkpoints/latest-checkpoint.pt", positional=True, metavar="ORIGINAL_DIR"
    )
    output: str = option(help="folder to make", positional=True, metavar="OUT_DIR")
    text_model: str | None = option(
        None,
        help="hub id or folder of the language model's config and tokenizer, as Qwen/Qwen2.5-1.5B-Instruct",
        metavar="ID_OR_DIR",
    )
    vision_weights: str | None = option(
        None,
        help="SigLIP with timm's names (default: the checkpoint's own, or else hf-hub:timm/ViT-SO400M-14-SigLIP-384)",
        metavar="FILE_OR_TIMM_ID",
    )
    vision_heads: int | None = option(None, help="attention heads of a vision tower of unusual width", metavar="N")
    to_original: bool = option(
        False, help="the other way: ORIGINAL_DIR is a model's folder, OUT_DIR gets the original's layout"
    )

    def __post_init__(self):
        if self.to_original and (self.text_model or self.vision_heads):
            raise ValueError("--to-original takes no --text-model and no --vision-heads: the model's folder has both")
        if not self.to_original and not self.text_model:
            raise ValueError("--text-model is required (a hub id or folder, as Qwen/Qwen2.5-1.5B-Instruct)")


@dataclass(frozen=True)
class ExportOptions:
    """What is written for other programs: the options of `open-qwen2vl export`."""

    model: str = option(
        help="folder of a model, of an adapter (merged first) or of a training", positional=True, metavar="MODEL"
    )
    output: str = option(help="folder to make", metavar="FOLDER")
    format: Literal["gguf"] = option("gguf", help="llama.cpp's: a file of the language model, and an mmproj file")
    type: Literal["f16", "q8_0"] = option("f16", help="of the matrices")
    image_seq_length: int | None = option(
        None, help="the full grid, for a model trained with fewer tokens an image (llama.cpp cannot pool)", metavar="N"
    )


@dataclass(frozen=True)
class InitVitOptions:
    """Whose parts a new Qwen2-VL is made of: the options of `open-qwen2vl init-vit`."""

    model: str = option(
        help="Qwen2-VL, folder or hub id: its config and processor, and its language model",
        positional=True,
        metavar="MODEL",
    )
    clip: str = option(
        help="model of open_clip: its name, hf-hub:OWNER/NAME or local-dir:FOLDER; DFN5B's is ViT-H-14-quickgelu",
        metavar="NAME",
    )
    output: str = option(help="folder to make", metavar="OUT_DIR")
    pretrained: str | None = option(
        None, help="weights of a model by name: a tag of open_clip, as dfn5b, or a file", metavar="TAG_OR_FILE"
    )
    language_model: str | None = option(
        None,
        help="Qwen2, folder or hub id, instead of MODEL's (whose weights are then not needed)",
        metavar="ID_OR_DIR",
    )
    images: tuple[str, ...] = option(
        (),
        help="pictures, folders or tars of them, on which CLIP's ln_pre is folded (left out without)",
        metavar="PATH",
    )
    seed: int = option(0, help="of the merger's random weights", metavar="N")
