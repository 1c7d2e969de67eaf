"""Step 2: a small Qwen2-VL with random weights, in the form that a real run takes from the Hub.

    data/train-*.tar or train.json  ->  init/  transformers' own Qwen2VLForConditionalGeneration, its processor, and a
                                               byte-level BPE trained on the captions or conversations

`recipes/pretrain.py` treats the folder like `Qwen/Qwen2-VL-2B-Instruct`. Nothing in it has learned anything yet.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from open_qwen2vl.families.qwen_vl.processing import training_template
from open_qwen2vl.files import new_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from build_backbones import CHAT_WORDS, entry, read_captions, train_tokenizer  # noqa: E402

# A token shows 32 x 32 pixels: patches of 16, merged two by two. An image has 4 to 64 tokens.
PATCH, MERGE = 16, 2
MIN_TOKENS, MAX_TOKENS = 4, 64
VISION = {"embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 4}
TEXT = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Near 1 / sqrt(width), as the quickstart found for models so narrow.
INITIALIZER_RANGE = 0.08
# M-RoPE gives columns its lowest frequencies: with the usual 1e6 the few of a small picture would turn nothing.
ROPE_THETA = 20.0
VOCABULARY = 2560
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
BOX_TOKENS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")


def read_texts(data: Path) -> tuple[list[str], tuple[str, ...]]:
    """What the tokenizer is trained on, and its special tokens: with those of boxes for conversations."""
    shards, conversations = sorted(data.glob("train-*.tar")), data / "train.json"
    if shards:
        return read_captions(shards), SPECIAL_TOKENS
    if not conversations.exists():
        raise ValueError(f"{data} holds neither train-*.tar nor train.json: run the step before this one first")
    parts = [
        part
        for record in json.loads(conversations.read_text())
        for message in record["messages"]
        for part in message["content"]
    ]
    texts = [part.get("text") or part.get("label") or "" for part in parts]
    return [*texts, *[CHAT_WORDS, "(0,1),(2,3)"] * len(texts)], (*SPECIAL_TOKENS, *BOX_TOKENS)


def build_processor(
    texts: list[str], special_tokens: Sequence[str] = SPECIAL_TOKENS, patch_size: int = PATCH
) -> Qwen2VLProcessor:
    """Qwen2-VL's processor for small pictures, with a tokenizer trained on the texts."""
    tokenizer = train_tokenizer(texts, VOCABULARY, special_tokens)
    area = (patch_size * MERGE) ** 2
    sizes = {
        "size": {"shortest_edge": MIN_TOKENS * area, "longest_edge": MAX_TOKENS * area},
        "patch_size": patch_size,
        "merge_size": MERGE,
    }
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
    )
    # The released checkpoints' own, with marks around what is trained on.
    processor.chat_template = training_template(processor)
    return processor


def build_model(
    processor: Qwen2VLProcessor,
    vision: dict | None = None,
    text: dict | None = None,
    rope_theta: float = ROPE_THETA,
) -> Qwen2VLForConditionalGeneration:
    """A random model with the ids of the tokenizer; `vision` and `text` replace entries of `VISION` and `TEXT`."""
    vision, text = VISION | (vision or {}), TEXT | (text or {})
    tokenizer = processor.tokenizer
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    head = text["hidden_size"] // text["num_attention_heads"]
    text |= {
        "vocab_size": -(-len(tokenizer) // 64) * 64,  # a multiple of 64, as matrix kernels like it
        "max_position_embeddings": 4096,
        "initializer_range": INITIALIZER_RANGE,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, "mrope_section": [head // 6] * 3},
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision |= {
        "patch_size": processor.image_processor.patch_size,
        "spatial_merge_size": MERGE,
        "hidden_size": text["hidden_size"],
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={**vision, "initializer_range": INITIALIZER_RANGE},
        tie_word_embeddings=True,
        **ids,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def build(
    data: Path,
    output: Path,
    seed: int = 0,
    patch_size: int = PATCH,
    vision: dict | None = None,
    text: dict | None = None,
    rope_theta: float = ROPE_THETA,
) -> dict:
    """Save the model and its processor; a folder that is there already is left as it is.

    Args:
        data (`Path`): folder of step 1.
        output (`Path`): gets the model; it appears whole or not at all.
        seed (`int`, *optional*, defaults to 0): of the random weights.
        patch_size (`int`, *optional*, defaults to 16): pixels of a patch's side.
        vision (`dict`, *optional*): entries that replace those of `VISION`.
        text (`dict`, *optional*): entries that replace those of `TEXT`.
        rope_theta (`float`, *optional*, defaults to 20): base of M-RoPE's frequencies.

    Returns:
        `dict`: sizes, also in `init.json`.

    Raises:
        ValueError: if `data` holds neither training shards nor conversations.
    """
    summary_file = output / "init.json"
    if summary_file.exists():
        return json.loads(summary_file.read_text())
    texts, special_tokens = read_texts(data)
    with new_folder(output) as folder:
        torch.manual_seed(seed)
        processor = build_processor(texts, special_tokens, patch_size)
        model = build_model(processor, vision, text, rope_theta)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        tower = sum(parameter.numel() for parameter in model.model.visual.parameters())
        summary = {"seed": seed, "vision_parameters": tower, "parameters": model.num_parameters()}
        (folder / "init.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("runs/qwen2_vl/data"), help="folder of the tars or conversations"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/qwen2_vl/init"))
    parser.add_argument("--patch-size", type=int, default=PATCH, help="pixels of a patch's side")
    for part, size in (("vision", VISION), ("text", TEXT)):
        help_text = f"entries of the config that replace {size}"
        parser.add_argument(f"--{part}", type=entry, nargs="+", default=[], metavar="NAME=VALUE", help=help_text)
    parser.add_argument("--rope-theta", type=float, default=ROPE_THETA, help="base of M-RoPE's frequencies")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args()
    try:
        sizes = {"vision": dict(args.vision), "text": dict(args.text), "rope_theta": args.rope_theta}
        summary = build(args.data, args.output, args.seed, args.patch_size, **sizes)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"random Qwen2-VL in {args.output}: {summary['parameters'] / 1e6:.2f}M parameters, "
        f"{summary['vision_parameters'] / 1e6:.2f}M of them in the vision tower"
    )


if __name__ == "__main__":
    main()
