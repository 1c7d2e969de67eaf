"""Tokens per second and MFU of pre-training, lever by lever, with real JPEGs decoded in the loop.

    python benchmarks/mfu.py [--size 2b] [--steps 20] [--levers default compile ...]
    python benchmarks/mfu.py --tiny

Random weights in the true sizes; packs of 4096 positions planned from a tar of photographs; PackedTrainer itself, one
process per lever. The figures are the trainer's own, of the steps after a warm-up. `--tiny` runs all of it on a CPU
with a model of a few thousand parameters. Prints a Markdown table and writes it to benchmarks/results/mfu.md.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from photo_packs import make_packs, make_processor
from report import describe_machine, write_result
from transformers import Qwen2Config, SiglipVisionConfig, TrainerCallback

from open_qwen2vl import (
    OpenQwen2VLConfig,
    OpenQwen2VLForConditionalGeneration,
    PackedDataset,
    PackedTrainer,
    PackedTrainingArguments,
    PackingCollator,
)

SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
SIZES = {
    "2b": {
        "title": "SigLIP-SO400M + Qwen2.5-1.5B",
        "vision": {**SO400M, "image_size": 384, "patch_size": 14},
        "text": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
        "image_seq_length": 144,
        "max_length": 4096,
    },
    "0.5b": {
        "title": "SigLIP-SO400M + Qwen2.5-0.5B",
        "vision": {**SO400M, "image_size": 384, "patch_size": 14},
        "text": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
        "image_seq_length": 144,
        "max_length": 4096,
    },
    "tiny": {
        "title": "a few thousand parameters",
        "vision": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2},
        "image_seq_length": 4,
        "max_length": 128,
    },
}

# What differs from the default: the model's attention, options of the trainer, packs padded to one shape.
LEVERS = {
    "default": {},
    "sdpa": {"attention": "sdpa"},
    "compile": {"args": {"torch_compile": True}, "fixed_shape": True},
    "batch2": {"args": {"per_device_train_batch_size": 2}},
    "batch4": {"args": {"per_device_train_batch_size": 4}},
    "batch4_compile": {"args": {"per_device_train_batch_size": 4, "torch_compile": True}, "fixed_shape": True},
    "checkpoint2": {
        "args": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}
    },
    "checkpoint": {"args": {"activation_checkpointing": True}},
}
NAMES = {
    "default": "`packed_varlen`, 1 pack per micro-batch, eager, all activations kept",
    "sdpa": "`attn_implementation: sdpa`",
    "compile": "`torch_compile: true`, packs of one shape",
    "batch2": "2 packs per micro-batch",
    "batch4": "4 packs per micro-batch",
    "batch4_compile": "4 packs per micro-batch and `torch_compile: true`",
    "checkpoint2": "activation checkpointing of every second layer",
    "checkpoint": "activation checkpointing of every layer",
}
TINY_LEVERS = ["default", "checkpoint2"]


def make_config(size: str) -> OpenQwen2VLConfig:
    sizes = SIZES[size]
    text = Qwen2Config(
        **sizes["text"],
        num_key_value_heads=2,
        vocab_size=512 if size == "tiny" else 151936,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    return OpenQwen2VLConfig(
        vision_config=SiglipVisionConfig(**sizes["vision"]),
        text_config=text,
        image_seq_length=sizes["image_seq_length"],
    )


def size_processor(size: str):
    return make_processor(SIZES[size]["vision"]["image_size"], SIZES[size]["image_seq_length"])


class AfterWarmUp(TrainerCallback):
    """The last log: with `logging_steps` the number of measured steps, its window holds none of the warm-up."""

    def __init__(self):
        self.log: dict[str, float] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "tokens_per_second" in logs:
            self.log = dict(logs)


def measure(size: str, lever: str, packs: Path, steps: int, workers: int, folder: Path) -> dict:
    """Train `2 * steps` steps here; figures of the second half, the first being the warm-up."""
    options, gpu = LEVERS[lever], torch.cuda.is_available()
    processor = size_processor(size)
    config = make_config(size)
    config.image_token_id = processor.image_token_id
    with torch.device("cuda" if gpu else "cpu"):
        model = OpenQwen2VLForConditionalGeneration._from_config(
            config, attn_implementation=options.get("attention", "packed_varlen"), dtype=torch.float32
        )
    args = PackedTrainingArguments(
        output_dir=str(folder),
        max_steps=2 * steps,
        logging_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=gpu,
        learning_rate=1e-5,
        # Random weights and endless epochs of the same photographs: the loss means nothing here.
        max_loss_rise=0,
        dataloader_num_workers=workers,
        **options.get("args", {}),
    )
    collator = PackingCollator(pad_to_multiple_of=SIZES[size]["max_length"] if options.get("fixed_shape") else None)
    last = AfterWarmUp()
    trainer = PackedTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=PackedDataset(packs, processor),
        processing_class=processor,
        callbacks=[last],
    )
    trainer.train()
    memory = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    names = ("tokens_per_second", "images_per_second", "tflops_per_second", "mfu", "data_wait")
    return {"memory": memory, **{name: last.log.get(name) for name in names}}


def measure_in_a_process(args: argparse.Namespace, lever: str, packs: Path, folder: Path) -> dict:
    command = [sys.executable, __file__, "--one", lever, "--packs", str(packs), "--size", args.size]
    command += ["--steps", str(args.steps), "--workers", str(args.workers), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    # A lever that does not fit or does not run here leaves its row empty and the others stand.
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"failed": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def row(lever: str, result: dict) -> str:
    if "failed" in result:
        return f"| {NAMES[lever]} | {result['failed'][:80]} | | | | |"

    def shown(name: str, form: str) -> str:
        return "-" if result[name] is None else format(result[name], form)

    return (
        f"| {NAMES[lever]} | {shown('tokens_per_second', ',.0f')} | {shown('tflops_per_second', ',.3g')} "
        f"| {shown('mfu', '.1%')} | {shown('data_wait', '.1%')} | {shown('memory', '.1f')} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="2b", help="model (default: 2b)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU, for the test of this script")
    parser.add_argument("--steps", type=int, default=20, help="measured steps, after as many to warm up")
    parser.add_argument(
        "--levers", nargs="+", choices=LEVERS, help="default: all (with --tiny: default and checkpoint2)"
    )
    parser.add_argument("--workers", type=int, default=8, help="processes that decode")
    parser.add_argument("--samples", type=int, default=2_000, help="image-text pairs in the tar, read in epochs")
    parser.add_argument("--width", type=int, default=1024, help="width of the photographs, 4:3")
    parser.add_argument("--one", choices=LEVERS, help=argparse.SUPPRESS)
    parser.add_argument("--packs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.size, args.one, args.packs, args.steps, args.workers, args.folder)))
        return
    if args.tiny:
        args.size, args.workers, args.samples, args.width = "tiny", 0, 40, 128
    elif not torch.cuda.is_available():
        parser.error("this needs a GPU; --tiny runs the same on a CPU")
    with tempfile.TemporaryDirectory() as folder:
        max_length = SIZES[args.size]["max_length"]
        packs = make_packs(
            Path(folder), size_processor(args.size), args.samples, args.width, args.width * 3 // 4, max_length
        )
        levers = args.levers or (TINY_LEVERS if args.tiny else list(LEVERS))
        rows = [row(lever, measure_in_a_process(args, lever, packs, Path(folder, lever))) for lever in levers]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = [
        f"{SIZES[args.size]['title']}, packs of {max_length} positions, photographs {args.width} px wide, {device};",
        f"{args.steps} steps after as many to warm up.",
        "",
        "| what differs | tokens/s | TFLOP/s | MFU | waiting for data | peak GiB |",
        "|---|---:|---:|---:|---:|---:|",
        *rows,
    ]
    machine = describe_machine(shlex.join(["python", *sys.argv]))
    if args.tiny:
        # A run of the script's own test: nothing to be kept as a result.
        print("\n".join([*table, "", *machine]))
        return
    write_result("mfu", table, machine)


if __name__ == "__main__":
    main()
