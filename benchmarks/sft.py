"""Fine-tuning on packed conversations against TRL's own SFTTrainer on the same conversations, one by one and padded.

    python benchmarks/sft.py [--threads 1] [--steps 6] [--rounds 2] [--conversations 2000] [--variants packed trl ...]
    python benchmarks/sft.py --share-images [--threads 1] [--steps 2] [--rounds 2]

2,000 conversations are made up (one to four questions, a JPEG in 19 of 20, answers of 1 to 200 words, ids of Qwen2.5's
tokenizer) and saved as a Hugging Face data set. `packed` plans them with `open-qwen2vl pack` and trains with
PackedSFTTrainer on one pack of 4096 a step. `trl` is the stock SFTTrainer with its stock collator and
`assistant_only_loss`, on as many rows a step as give about as many tokens. Both train projector and language model of
the same small model with the real vocabulary (12-block ViT of width 192, frozen; 144 tokens an image; 4-layer Qwen2
of width 384), fp32, AdamW, no activation checkpointing; decoding and resizing are part of the time. Every run is a
process of its own, so that its peak memory is its own, and the variants take turns. Prints a Markdown table and
writes it to benchmarks/results/sft.md.

`--share-images` compares packing with and without it on the sets of shared_sets.py, at 729 tokens an image, and writes
benchmarks/results/sft_shared.md: the same trainer, each variant on packs of its own, conversations a CPU second. What
sharing saves depends on what a head costs beside the blocks, and the vision tower beside both: here as in the 2B model
(0.18 and 0.29 a position), by Qwen's first 2,800 tokens and four vision blocks.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import datasets
import numpy as np
import torch
from PIL import Image
from report import describe_machine, write_result
from shared_sets import SETS, WORDS, flops_per_conversation, shared_set
from transformers import AutoProcessor, Qwen2Config, SiglipVisionConfig, TrainerCallback
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from trl import SFTConfig, SFTTrainer

from open_qwen2vl import (
    OpenQwen2VLConfig,
    OpenQwen2VLForConditionalGeneration,
    OpenQwen2VLProcessor,
    PackedSFTConfig,
    PackedSFTTrainer,
    cli,
)
from open_qwen2vl.data.packing.mixture import PackMixture
from open_qwen2vl.data.packing.sources import parse_sources

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.qwen_tokenizer import build_qwen_tokenizer  # noqa: E402

IMAGE_SIZE, IMAGE_TOKENS, PACK = 168, 144, 4096
# With four blocks of width 384 the head then costs 0.18 of these, and four vision blocks 0.29, as in the 2B model.
SHARED_VOCABULARY = 2800
VARIANTS = {
    "packed": "PackedSFTTrainer on packs",
    "unpacked": "PackedSFTTrainer on rows",
    "trl": "TRL's SFTTrainer on rows",
}


def make_conversation(number: int) -> dict:
    random = np.random.default_rng(number)
    with_image = random.random() < 0.95
    messages = []
    for turn in range(random.integers(1, 5)):
        question = " ".join(random.choice(WORDS, random.integers(4, 25)))
        answer = " ".join(random.choice(WORDS, int(np.clip(random.lognormal(2.6, 1.2), 1, 200))))
        mark = "<image>\n" if with_image and turn == 0 else ""
        messages += [{"role": "user", "content": mark + question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [make_jpeg(random)] if with_image else []}


def make_jpeg(random: np.random.Generator) -> dict:
    coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return {"bytes": file.getvalue(), "path": None}


def in_parts(row: dict) -> dict:
    """TRL puts images where parts say so; in strings it would train on the text `<image>`."""
    messages = []
    for message in row["messages"]:
        first, *rest = message["content"].split("<image>")
        parts = [{"type": "text", "text": first}] if first else []
        parts += [part for text in rest for part in ({"type": "image"}, {"type": "text", "text": text})]
        messages.append({"role": message["role"], "content": parts})
    return {**row, "messages": messages}


def make_processor(folder: Path, image_size: int, tokens: int, *vocabulary: int) -> None:
    (folder / "tokenizer").mkdir()
    tokenizer = build_qwen_tokenizer(folder / "tokenizer", *vocabulary)
    SiglipImageProcessorPil(size={"height": image_size, "width": image_size}).save_pretrained(folder / "vision")
    processor = OpenQwen2VLProcessor.from_vision_text_pretrained(
        str(folder / "vision"), str(tokenizer), image_seq_length=tokens
    )
    processor.save_pretrained(folder / "processor")


def prepare(folder: Path, conversations: int) -> None:
    """Processor, data set and plan."""
    make_processor(folder, IMAGE_SIZE, IMAGE_TOKENS)
    rows = datasets.Dataset.from_list([in_parts(make_conversation(number)) for number in range(conversations)])
    rows.cast_column("images", datasets.List(datasets.Image())).save_to_disk(folder / "rows")
    sizes = ["--image-seq-length", str(IMAGE_TOKENS), "--max-length", str(PACK), "--num-workers", "1"]
    files = [str(folder / "rows"), "--output", str(folder / "packs"), "--tokenizer", str(folder / "processor")]
    assert cli.main(["pack", *files, *sizes]) == 0


def make_model(processor: OpenQwen2VLProcessor) -> OpenQwen2VLForConditionalGeneration:
    is_shared = len(processor.tokenizer) < 151_000
    vision = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=5 if is_shared else 12,
        num_attention_heads=3,
        image_size=processor.image_processor.size["height"],
        patch_size=14,
    )
    text = Qwen2Config(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=SHARED_VOCABULARY + 32 if is_shared else 151936,
        tie_word_embeddings=True,
    )
    config = OpenQwen2VLConfig(vision_config=vision, text_config=text, image_seq_length=processor.image_seq_length)
    torch.manual_seed(0)
    model = OpenQwen2VLForConditionalGeneration._from_config(config, attn_implementation="packed_varlen")
    model.model.vision_tower.requires_grad_(False)
    return model


class Timer(TrainerCallback):
    """Wall and CPU time of a training, data included."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter(), time.process_time()

    def on_train_end(self, args, state, control, **kwargs):
        self.wall, self.cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]


def measure(variant: str, folder: Path, threads: int, steps: int, rows_per_step: int) -> dict:
    """Train one variant here."""
    torch.set_num_threads(threads)
    processor = AutoProcessor.from_pretrained(folder / "processor", trust_remote_code=False)
    options = {
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "max_steps": steps,
        "learning_rate": 1e-4,
        "dataloader_num_workers": 0,
        "per_device_train_batch_size": 1 if variant == "packed" else rows_per_step,
    }
    timer = Timer()
    rows = datasets.load_from_disk(folder / "rows") if variant != "packed" else None
    with tempfile.TemporaryDirectory() as output_dir:
        if variant == "trl":
            args = SFTConfig(output_dir, assistant_only_loss=True, max_length=None, **options)
            trainer = SFTTrainer(
                make_model(processor), args, train_dataset=rows, processing_class=processor, callbacks=[timer]
            )
        else:
            data = PackMixture(parse_sources(str(folder / "packs")), processor) if variant == "packed" else rows
            args = PackedSFTConfig(output_dir, **options)
            trainer = PackedSFTTrainer(
                make_model(processor), args, data, processing_class=processor, callbacks=[timer]
            )
        trainer.train()
    examples = steps * rows_per_step if variant == "trl" else trainer.summary()["documents"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"examples": examples, "cpu": timer.cpu, "wall": timer.wall, "peak_gb": peak}


def measure_in_a_process(variant: str, folder: Path, args: argparse.Namespace, rows_per_step: int) -> dict:
    command = [sys.executable, __file__, "--one", variant, "--folder", str(folder), "--rows", str(rows_per_step)]
    command += ["--threads", str(args.threads), "--steps", str(args.steps)]
    output = subprocess.run(command, capture_output=True, text=True)
    if output.returncode:
        sys.exit(output.stderr)
    return json.loads(output.stdout.splitlines()[-1])


def describe(plan: dict, args: argparse.Namespace, rows_per_step: int) -> list[str]:
    totals = plan["totals"]
    per_pack = totals["documents"] / totals["packs"]
    return [
        f"{totals['documents']:,} conversations in {totals['packs']} packs of {PACK} ({per_pack:.1f} a pack); TRL has "
        f"{rows_per_step} rows a step. {args.steps} steps a run, median of {args.rounds}, {args.threads} thread(s).",
        "",
        "| trainer | examples per CPU second | per wall second | x TRL (CPU) | peak GB |",
        "|---|---|---|---|---|",
    ]


def compare_shared(args: argparse.Namespace) -> None:
    """Packs with and without shared pictures, of each set."""
    lines = [
        f"Conversations a CPU second of PackedSFTTrainer on packs of {PACK}, 729 tokens an image, {args.steps} steps "
        f"a run, median of {args.rounds}, {args.threads} thread(s); the 2B column is computed: FLOPs a conversation "
        "of the 2B model with a frozen tower, without sharing by those with it.",
        "",
        "| conversations | a picture | pictures saved | alone: per CPU s | shared: per CPU s | x | x for 2B |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        for number, (what, conversations) in enumerate(SETS.items()):
            folder = Path(name) / str(number)
            folder.mkdir()
            make_processor(folder, 378, 729, SHARED_VOCABULARY)
            source, images = shared_set(folder, conversations, make_jpeg)
            totals, speed = {}, {}
            for variant, options in (("alone", []), ("shared", ["--share-images"])):
                own = folder / variant
                own.mkdir()
                (own / "processor").symlink_to(folder / "processor")
                files = [str(source), "--images", str(images), "--output", str(own / "packs"), "--num-workers", "1"]
                sizes = ["--processor", str(own / "processor"), "--max-length", str(PACK)]
                assert cli.main(["pack", *files, *sizes, *options]) == 0
                totals[variant] = json.loads((own / "packs" / "plan.json").read_text())["totals"]
                runs = [measure_in_a_process("packed", own, args, 0) for _ in range(args.rounds)]
                speed[variant] = median(run["examples"] / run["cpu"] for run in runs)
            flops = {variant: flops_per_conversation(own) for variant, own in totals.items()}
            alone, shared = totals["alone"], totals["shared"]
            lines.append(
                f"| {what} | {alone['images'] / shared['images']:.1f} | {shared['shared'] / alone['images']:.0%} "
                f"| {speed['alone']:.2f} | {speed['shared']:.2f} | {speed['shared'] / speed['alone']:.2f} "
                f"| {flops['alone'] / flops['shared']:.2f} |"
            )
    command = f"python benchmarks/sft.py --share-images --threads {args.threads} --steps {args.steps}"
    write_result("sft_shared", lines, describe_machine(f"{command} --rounds {args.rounds}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run (default: 6)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each variant; the median counts (default: 2)")
    parser.add_argument("--conversations", type=int, default=2000, help="default: 2000")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--share-images", action="store_true", help="compare packs with and without shared pictures")
    for hidden in ("--one", "--folder", "--rows"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, Path(args.folder), args.threads, args.steps, int(args.rows))))
        return
    if args.share_images:
        compare_shared(args)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args.conversations)
        plan = json.loads((folder / "packs" / "plan.json").read_text())
        rows_per_step = round(plan["totals"]["documents"] / plan["totals"]["packs"])
        runs: dict[str, list[dict]] = {variant: [] for variant in args.variants}
        for _ in range(args.rounds):
            for variant, found in runs.items():
                found.append(measure_in_a_process(variant, folder, args, rows_per_step))
    lines = describe(plan, args, rows_per_step)
    speed = {
        (variant, clock): median(run["examples"] / run[clock] for run in found)
        for variant, found in runs.items()
        for clock in ("cpu", "wall")
    }
    for variant, found in runs.items():
        ratio = f"{speed[variant, 'cpu'] / speed['trl', 'cpu']:.1f}" if "trl" in runs else "-"
        lines.append(
            f"| {VARIANTS[variant]} | {speed[variant, 'cpu']:.2f} | {speed[variant, 'wall']:.2f} | {ratio} "
            f"| {max(run['peak_gb'] for run in found):.1f} |"
        )
    command = f"python benchmarks/sft.py --threads {args.threads} --steps {args.steps} --rounds {args.rounds}"
    write_result("sft", lines, describe_machine(command))


if __name__ == "__main__":
    main()
