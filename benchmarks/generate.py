"""Generation of this class against transformers' own LLaVA class that holds the same two backbones.

    python benchmarks/generate.py [--threads 2] [--repeats 5] [--batches 1 8] [--new-tokens 24]

Both classes get the same random weights, projector included, and the same prompts: one 224 px image of 256 tokens (the
whole grid, because LLaVA does not pool) and 16 tokens of text, 3 more from row to row; left-padded, greedy, dynamic
cache, `sdpa`, fp32.
They take turns in one process, and each run must give the same token ids. The backbones are those of
benchmarks/train_step.py. Prints a Markdown table and writes it to benchmarks/results/generate.md.
"""

import argparse
import sys
import time
from statistics import median

import torch
from report import describe_machine, write_result
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
    StoppingCriteria,
)

from open_qwen2vl import OpenQwen2VLConfig, OpenQwen2VLForConditionalGeneration

IMAGE_SIZE, PATCH_SIZE = 224, 14
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
NAMES = {"ours": "`OpenQwen2VLForConditionalGeneration`", "llava": "`LlavaForConditionalGeneration`"}


def make_configs() -> tuple[OpenQwen2VLConfig, LlavaConfig]:
    vision = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    # Wide initial weights: with narrow ones a tied model repeats its last token, whatever the picture is.
    text = Qwen2Config(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    ours = OpenQwen2VLConfig(vision_config=vision, text_config=text, image_seq_length=IMAGE_TOKENS)
    llava = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ours.image_token_id,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    return ours, llava


def make_models() -> dict[str, PreTrainedModel]:
    ours_config, llava_config = make_configs()
    torch.manual_seed(0)
    ours = OpenQwen2VLForConditionalGeneration._from_config(ours_config, attn_implementation="sdpa").eval()
    llava = LlavaForConditionalGeneration._from_config(llava_config, attn_implementation="sdpa").eval()
    missing, unexpected = llava.load_state_dict(ours.state_dict(), strict=False)
    # LLaVA also runs the last vision block, the final norm and the pooling head; its answers do not depend on them.
    unused = ("encoder.layers.11.", "post_layernorm.", "head.")
    assert not unexpected, unexpected
    assert all(name.removeprefix("model.vision_tower.").startswith(unused) for name in missing), missing
    return {"ours": ours, "llava": llava}


def make_prompts(batch: int, image_token_id: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts of one image each, texts of 16, 19, 22, ... tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = [IMAGE_TOKENS + 16 + 3 * row for row in range(batch)]
    longest = max(lengths)
    input_ids = torch.randint(0, 150_000, (batch, longest), generator=generator)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        start = longest - length
        attention_mask[row, start:] = 1
        input_ids[row, start : start + IMAGE_TOKENS] = image_token_id
    pixel_values = torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * 2 - 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}


class Clock(StoppingCriteria):
    """Notes when each token was chosen, and never stops."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def generate(model: PreTrainedModel, prompts: dict, new_tokens: int) -> tuple[torch.Tensor, dict[str, float]]:
    clock = Clock()
    ids = model.generate(
        **prompts,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[clock],
    )
    begin, first, last = clock.times[0], clock.times[1], clock.times[-1]
    batch = len(ids)
    times = {
        "first": first - begin,
        "speed": batch * new_tokens / (last - begin),
        "decode": batch * (new_tokens - 1) / (last - first),
    }
    return ids[:, prompts["input_ids"].shape[1] :], times


def compare(models: dict[str, PreTrainedModel], batch: int, repeats: int, new_tokens: int) -> dict[str, dict]:
    """Medians of each class over `repeats` runs in turn, after one that does not count."""
    prompts = make_prompts(batch, models["ours"].config.image_token_id)
    runs = {name: [] for name in models}
    for repeat in range(repeats + 1):
        answers = {}
        # Whoever goes second finds warmer caches: they swap places each time.
        for name in sorted(models, reverse=repeat % 2 == 1):
            answers[name], times = generate(models[name], prompts, new_tokens)
            if repeat:
                runs[name].append(times)
        assert torch.equal(answers["ours"], answers["llava"]), "the two classes chose different tokens"
        assert len(answers["ours"].unique()) > new_tokens // 2, "the answers are one token over and over"
    return {name: {key: median(run[key] for run in own) for key in own[0]} for name, own in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each class; the median counts (default: 5)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens of each answer, 2 or more (default: 24)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = make_models()
    lines = [
        f"Greedy answers of {args.new_tokens} tokens to one image ({IMAGE_TOKENS} tokens) and a short text each; "
        f"{args.threads} thread(s), medians of {args.repeats} runs in turn; both classes chose the same tokens.",
        "",
        "| batch | class | first token, ms | tokens/s | tokens/s after the first |",
        "|---:|---|---:|---:|---:|",
    ]
    for batch in args.batches:
        results = compare(models, batch, args.repeats, args.new_tokens)
        for name, result in results.items():
            lines.append(
                f"| {batch} | {NAMES[name]} | {result['first'] * 1000:,.0f} | {result['speed']:.1f} "
                f"| {result['decode']:.1f} |"
            )
        gain = {key: results["ours"][key] / results["llava"][key] for key in ("first", "speed", "decode")}
        lines.append(f"| {batch} | ours / LLaVA | {gain['first']:.2f} | {gain['speed']:.2f} | {gain['decode']:.2f} |")
    write_result("generate", lines, describe_machine(" ".join(["python benchmarks/generate.py", *sys.argv[1:]])))


if __name__ == "__main__":
    main()
