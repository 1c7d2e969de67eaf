"""One training step (forward and backward, AdamW apart) of 20 captions at the real vocabulary, in several ways.

    python benchmarks/train_step.py [--threads 1] [--repeats 2] [--variants packed padded ...]

The sizes are those at which the original's own code was measured on a CPU (22.0 user CPU seconds and 9.3 GB on one
thread in fp32): a 12-block ViT of width 192 on 384 px images, frozen; 144 tokens an image; a 6-layer Qwen2 of width
512 with 151,936 rows; 20 captions, 3,525 positions. Qwen2-VL has a 6-block ViT and the same language model, all of
which trains, and the same 20 texts with images of nine sizes. Every variant runs in a process of its own, so that its
peak memory is its own. Prints a Markdown table and writes it to benchmarks/results/train_step.md.
"""

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time

import qwen_vl_step
import torch
from report import describe_machine, write_result
from transformers import PreTrainedModel, Qwen2Config, SiglipVisionConfig
from transformers.loss.loss_utils import ForCausalLMLoss

from open_qwen2vl import OpenQwen2VLConfig, OpenQwen2VLForConditionalGeneration, PackingCollator

TEXT_LENGTHS = [83, 3, 27, 13, 15, 17, 5, 17, 11, 200, 23, 16, 16, 13, 10, 15, 28, 17, 39, 17]
IMAGE_TOKENS = 144
VARIANTS = {
    "packed": "packed, documents isolated, `packed_varlen`, loss at labelled positions",
    "packed_sdpa": "the same through `sdpa` with its dense mask",
    "packed_full_logits": "packed, but full fp32 logits",
    "padded": "one caption per row, padded, loss at labelled positions",
    "reference": "packed as the original: dense causal attention, all 12 ViT blocks, full fp32 logits",
    "packed_bf16": "packed in bf16 weights",
    "deep": "packed, 24 blocks instead of 6",
    "deep_every_second": "the same, activation checkpointing of every second block",
    "deep_every": "the same, activation checkpointing of every block",
    "qwen2_vl": "Qwen2-VL, images of nine sizes: packed, loss at labelled positions",
    "qwen2_vl_convolution": "the same with the stock processor's pixels, through the stock convolution",
    "qwen2_vl_stock": "Qwen2-VL, the same captions: stock forward, a caption a row, padded, full logits",
}
CHECKPOINTED = {"deep_every_second": 2, "deep_every": 1}


def make_model(variant: str) -> PreTrainedModel:
    if variant.startswith("qwen2_vl"):
        return qwen_vl_step.make_model(packed=variant != "qwen2_vl_stock")
    vision = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=3,
        image_size=384,
        patch_size=14,
    )
    text = Qwen2Config(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=24 if variant.startswith("deep") else 6,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    layer = -1 if variant == "reference" else -2
    config = OpenQwen2VLConfig(vision_config=vision, text_config=text, vision_feature_layer=layer)
    attention = "sdpa" if variant in ("packed_sdpa", "padded", "reference") else "packed_varlen"
    dtype = torch.bfloat16 if variant == "packed_bf16" else torch.float32
    torch.manual_seed(0)
    model = OpenQwen2VLForConditionalGeneration._from_config(config, attn_implementation=attention, dtype=dtype)
    model.model.vision_tower.requires_grad_(False)
    if variant in CHECKPOINTED:
        model.activation_checkpointing_enable(every_n_layers=CHECKPOINTED[variant])
    return model.train()


def make_item(lengths: list[int], config: OpenQwen2VLConfig) -> dict:
    """A pack of caption documents with random text: `<s>`, image, newline, text, `<|im_end|>`."""
    ids, labels, positions = [], [], []
    for length in lengths:
        text = torch.randint(0, 150_000, (length + 2,))
        document = torch.cat([torch.tensor([128245]), torch.full((IMAGE_TOKENS,), config.image_token_id), text])
        label = document.clone()
        label[: 1 + IMAGE_TOKENS] = -100
        ids.append(document)
        labels.append(label)
        positions.append(torch.arange(len(document)))
    return {
        "input_ids": torch.cat(ids),
        "labels": torch.cat(labels),
        "position_ids": torch.cat(positions),
        "pixel_values": torch.randint(0, 256, (len(lengths), 3, 384, 384), dtype=torch.uint8),
        "image_seq_length": IMAGE_TOKENS,
    }


def make_batch(variant: str, config: OpenQwen2VLConfig) -> dict:
    if variant.startswith("qwen2_vl"):
        documents = qwen_vl_step.make_documents(TEXT_LENGTHS)
        padded = qwen_vl_step.padded_batch(documents)
        if variant == "qwen2_vl_stock":
            return padded
        pixels = {} if variant == "qwen2_vl" else {"pixel_values": padded["pixel_values"]}
        return qwen_vl_step.packed_batch(documents) | pixels
    torch.manual_seed(1)
    if variant == "padded":
        batch = PackingCollator(cross_document_attention=True)([make_item([n], config) for n in TEXT_LENGTHS])
        lengths = torch.tensor([n + 3 + IMAGE_TOKENS for n in TEXT_LENGTHS])
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    else:
        batch = PackingCollator(cross_document_attention=variant == "reference")([make_item(TEXT_LENGTHS, config)])
    batch.pop("packing_stats")
    return batch


def step(model: PreTrainedModel, batch: dict, variant: str) -> float:
    if variant in ("reference", "packed_full_logits"):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits
        loss = ForCausalLMLoss(logits, batch["labels"], vocab_size=model.config.text_config.vocab_size)
    else:
        loss = model(**batch).loss
    loss.backward()
    return loss.item()


def measure(variant: str, threads: int, repeats: int) -> dict:
    """Run one variant here; the best of `repeats` steps."""
    torch.set_num_threads(threads)
    model = make_model(variant)
    batch = make_batch(variant, model.config)
    wall, cpu, loss = [], [], 0.0
    for _ in range(repeats):
        model.zero_grad()
        start, start_cpu = time.perf_counter(), time.process_time()
        loss = step(model, batch, variant)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"wall": min(wall), "cpu": min(cpu), "peak_gb": peak, "loss": loss}


def measure_in_a_process(variant: str, threads: int, repeats: int) -> dict:
    command = [sys.executable, __file__, "--one", variant, "--threads", str(threads), "--repeats", str(repeats)]
    output = subprocess.run(command, capture_output=True, text=True)
    if output.returncode:
        sys.exit(output.stderr)
    return json.loads(output.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--repeats", type=int, default=2, help="steps per variant; the best counts (default: 2)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.threads, args.repeats)))
        return
    results = {variant: measure_in_a_process(variant, args.threads, args.repeats) for variant in args.variants}
    base = results[args.variants[0]]
    lines = [
        f"Forward and backward of 20 captions (3,525 positions), {args.threads} thread(s), best of {args.repeats}.",
        "",
        f"| variant | CPU s | wall s | x {args.variants[0]} | peak GB | loss |",
        "|---|---|---|---|---|---|",
    ]
    for variant, result in results.items():
        lines.append(
            f"| {VARIANTS[variant]} | {result['cpu']:.1f} | {result['wall']:.1f} | {result['cpu'] / base['cpu']:.2f} "
            f"| {result['peak_gb']:.1f} | {result['loss']:.4f} |"
        )
    write_result("train_step", lines, describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
