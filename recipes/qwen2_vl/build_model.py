"""Step 2: a small Qwen2-VL with random weights, in the form that a real run takes from the Hub.

    data/train-*.tar  ->  init/  transformers' own Qwen2VLForConditionalGeneration, its processor, and a byte-level BPE
                                 trained on the captions

`recipes/pretrain.py` treats the folder like `Qwen/Qwen2-VL-2B-Instruct`. Nothing in it has learned anything yet.
"""

import argparse
import json
import os
import shutil
import sys
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

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from build_backbones import read_captions, train_tokenizer  # noqa: E402

# A token shows 32 x 32 pixels: patches of 16, merged two by two.
PATCH, MERGE = 16, 2
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
MIN_PIXELS, MAX_PIXELS = (2 * PATCH * MERGE) ** 2, (8 * PATCH * MERGE) ** 2
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
# As the released checkpoints': Qwen2-VL's own template for chats.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or "
    "'image_url' in content %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_processor(captions: list[str]) -> Qwen2VLProcessor:
    """Qwen2-VL's processor for small pictures, with a tokenizer trained on the captions."""
    tokenizer = train_tokenizer(captions, VOCABULARY, SPECIAL_TOKENS)
    sizes = {"size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}, "patch_size": PATCH}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(merge_size=MERGE, **sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(merge_size=MERGE, **sizes),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    """A random model whose ids are those of the tokenizer."""
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
    head = TEXT["hidden_size"] // TEXT["num_attention_heads"]
    text = {
        **TEXT,
        "vocab_size": -(-len(tokenizer) // 64) * 64,  # a multiple of 64, as matrix kernels like it
        "max_position_embeddings": 4096,
        "initializer_range": INITIALIZER_RANGE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 6] * 3},
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**VISION, "patch_size": PATCH, "spatial_merge_size": MERGE, "hidden_size": TEXT["hidden_size"]}
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


def build(data: Path, output: Path, seed: int = 0) -> dict:
    """Save the model and its processor; a folder that is there already is left as it is.

    Args:
        data (`Path`): folder of step 1.
        output (`Path`): gets the model; it appears whole or not at all.
        seed (`int`, *optional*, defaults to 0): of the random weights.

    Returns:
        `dict`: sizes, also in `init.json`.

    Raises:
        ValueError: if `data` holds no training shards.
    """
    summary_file = output / "init.json"
    if summary_file.exists():
        return json.loads(summary_file.read_text())
    shards = sorted(data.glob("train-*.tar"))
    if not shards:
        raise ValueError(f"{data} holds no train-*.tar: run build_pictures.py first")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    torch.manual_seed(seed)
    processor = build_processor(read_captions(shards))
    model = build_model(processor)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    tower = sum(parameter.numel() for parameter in model.model.visual.parameters())
    summary = {"seed": seed, "vision_parameters": tower, "parameters": model.num_parameters()}
    (partial / "init.json").write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, output)
    return summary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/qwen2_vl/data"), help="folder of the tars")
    parser.add_argument("--output", type=Path, default=Path("runs/qwen2_vl/init"))
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args()
    try:
        summary = build(args.data, args.output, args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"random Qwen2-VL in {args.output}: {summary['parameters'] / 1e6:.2f}M parameters, "
        f"{summary['vision_parameters'] / 1e6:.2f}M of them in the vision tower"
    )


if __name__ == "__main__":
    main()
