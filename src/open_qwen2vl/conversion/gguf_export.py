"""`open-qwen2vl export`: the language model and the vision side as two GGUF files, as llama.cpp reads them.

MODEL: config, processor, tensors (mapped; an adapter is merged first)
  │ what llama.cpp would compute differently is refused, every tensor has a name there: gguf_parts.py
  ▼
a temporary folder beside OUTPUT: model-TYPE.gguf, mmproj-TYPE.gguf, tensor by tensor  ─ rename ─▶  OUTPUT

Keys and tensors are those of llama.cpp's own convert_hf_to_gguf.py and of its tools/mtmd/clip.cpp (LLaVA's form).
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor

try:
    import gguf
    from gguf import GGMLQuantizationType as GgmlType
except ImportError as error:
    raise ValueError('the export needs gguf: pip install "open-qwen2vl[gguf]"') from error

from .. import model_folders
from ..files import new_folder, renamed_when_whole
from ..modeling.configuration_open_qwen2vl import OpenQwen2VLConfig
from ..processing.images import decode_image
from .convert import load_model
from .gguf_parts import add_text_keys, add_tokenizer, add_vision_keys, check_model, text_tensors, vision_tensors

FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
TYPES = {"f16": GgmlType.F16, "q8_0": GgmlType.Q8_0}
_DTYPES = {GgmlType.F32: np.float32, GgmlType.F16: np.float16, GgmlType.Q8_0: np.uint8}


@dataclass
class ExportReport:
    """What an export wrote; its text is what the command prints."""

    model: Path  # GGUF of the language model
    mmproj: Path  # GGUF of vision tower and projector
    image_size: int  # pixels of a side
    tensors: int  # in both files
    wider: list[str]  # matrices in f16 where q8_0 was asked for: their rows are no multiple of its blocks

    def __str__(self) -> str:
        """One line a fact, and what people have to know."""
        size = f"{self.image_size}x{self.image_size}"
        lines = {
            "language model": self.model,
            "vision": self.mmproj,
            "tensors": self.tensors,
            "run it": f"llama-mtmd-cli -m {self.model} --mmproj {self.mmproj} --image square.png -p 'What is shown?'",
            "mind": f"llama.cpp pads a picture that is not square, and this model was trained on stretched ones: the "
            f"answer would be another. Make it {size} first, by square_image (docs/serving.md, llama.cpp)",
        }
        if self.wider:
            lines["left in f16"] = f"{len(self.wider)}, whose rows are no multiple of 32: {self.wider[0]}, ..."
        return "\n".join(f"{name:<16}{value}" for name, value in lines.items())


def export_gguf(
    model: str | Path,
    output: str | Path,
    type: Literal["f16", "q8_0"] = "f16",
    image_seq_length: int | None = None,
) -> ExportReport:
    """Write a model for llama.cpp.

    Norms, biases and position embeddings are f32, the patch embedding is f16, every other matrix has `type`. Tensors
    are read and written one by one, so that the memory is that of the largest in fp32 and in the type (an adapter's
    model is held whole, to be merged).

    Args:
        model (`str` or `Path`): folder of a model, of an adapter (which is merged into its base), or of a training.
        output (`str` or `Path`): folder to make; it must not exist.
        type (`str`, *optional*, defaults to `"f16"`): `f16` (exact to fp16's rounding) or `q8_0` (8 bits and a scale
            for each 32 weights).
        image_seq_length (`int`, *optional*): the full grid, to export a model that was trained with fewer tokens an
            image: the weights are the same.

    Returns:
        [`ExportReport`].

    Raises:
        ValueError: for a model that llama.cpp cannot run as it is, with the way out: a pooled token budget, another
            family; for weights beyond fp16's range; if `output` exists.
        FileNotFoundError: if `model` has no weights.
    """
    folder, output = Path(model_folders.model_folder(model)), Path(output)
    _check_family(folder)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    config, state = load_model(folder)
    check_model(config, processor, image_seq_length)
    kind = TYPES[type]
    text, vision = text_tensors(state, config), vision_tensors(state, config)

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_name("Open-Qwen2VL")
        writer.add_file_type(FILE_TYPES[type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def describe_text(writer: gguf.GGUFWriter) -> None:
        describe(writer)
        add_text_keys(writer, config.text_config)
        add_tokenizer(writer, processor, config)

    def describe_vision(writer: gguf.GGUFWriter) -> None:
        describe(writer)
        add_vision_keys(writer, config, processor.image_processor)

    names = [f"model-{type}.gguf", f"mmproj-{type}.gguf"]
    with new_folder(output) as staged:
        _write(staged / names[0], "qwen2", text, kind, describe_text)
        _write(staged / names[1], "clip", vision, kind, describe_vision)
    tensors = {**text, **vision}
    wider = [name for name, tensor in tensors.items() if tensor.ndim == 2 and _is_wider(name, tensor, kind)]
    return ExportReport(*(output / name for name in names), config.vision_config.image_size, len(tensors), wider)


def square_image(source: str | os.PathLike, target: str | os.PathLike, size: int = 384) -> None:
    """Write a picture for llama.cpp as this model's processor would see it, which then changes no pixel.

    Args:
        source (`str` or `os.PathLike`): an image file, of any size and shape.
        target (`str` or `os.PathLike`): PNG to write, upright, RGB, stretched to the square.
        size (`int`, *optional*, defaults to 384): its side, that of the model.

    Raises:
        SampleError: for a file that is no image.
    """
    image = decode_image(Path(source).read_bytes()).resize((size, size), Image.Resampling.BICUBIC)
    with renamed_when_whole(Path(target)) as temporary:
        image.save(temporary, format="png")


def _check_family(folder: Path) -> None:
    """Refuse other families before their weights are read."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: give a folder (`hf download {folder} --local-dir model` makes one of a hub id)")
    base = folder
    if model_folders.is_adapter(folder):
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = model_folders.model_folder(settings["base_model_name_or_path"])
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if not isinstance(config, OpenQwen2VLConfig):
        merged = "" if base == folder else " (merge the adapter first: PEFT's merge_and_unload)"
        raise ValueError(
            f"{folder}: a {config.model_type} model goes through llama.cpp's own converter{merged}: "
            "`python convert_hf_to_gguf.py MODEL --outtype f16`, and once more with `--mmproj`"
        )


def _tensor_type(name: str, tensor: torch.Tensor, kind: GgmlType) -> GgmlType:
    """f32 for norms, biases and positions, f16 for the convolution; rows must hold whole blocks of q8_0."""
    if tensor.ndim < 2 or name == "v.position_embd.weight":
        return GgmlType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return GgmlType.F16 if tensor.ndim > 2 or tensor.shape[-1] % block else kind


def _is_wider(name: str, tensor: torch.Tensor, kind: GgmlType) -> bool:
    return _tensor_type(name, tensor, kind) not in (kind, GgmlType.F32)


def _write(
    path: Path,
    arch: str,
    tensors: dict[str, torch.Tensor],
    kind: GgmlType,
    describe: Callable[[gguf.GGUFWriter], None],
) -> None:
    """One GGUF file: its keys, then all tensors' places, then their values one by one."""
    writer = gguf.GGUFWriter(path, arch)
    describe(writer)
    kinds = {name: _tensor_type(name, tensor, kind) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kinds[name])
        dtype = np.dtype(_DTYPES[kinds[name]])
        # A shape in bytes is that of blocks alone; the others count values.
        given = shape if dtype == np.uint8 else tuple(tensor.shape)
        writer.add_tensor_info(name, given, dtype, int(np.prod(shape)), raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        writer.write_tensor_data(_values(name, tensor, kinds[name]))
    writer.close()


def _values(name: str, tensor: torch.Tensor, kind: GgmlType) -> np.ndarray:
    values = tensor.to(torch.float16 if kind == GgmlType.F16 else torch.float32)
    if not torch.isfinite(values).all():
        hint = "; q8_0 holds them" if kind == GgmlType.F16 and torch.isfinite(tensor).all() else ""
        raise ValueError(f"{name} has weights that are no number or that {kind.name} cannot hold{hint}")
    return gguf.quants.quantize(values.contiguous().numpy(), kind)
