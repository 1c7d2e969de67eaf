"""Time that a device waits for its loader under accumulation: micro-batches as they come, against all at once.

    python benchmarks/overlap.py [--accumulation 16] [--workers 4] [--steps 4] [--compute 0.2] [--loading 0.5]

PackedTrainer itself on a tiny model and real packs. The device is a sleep of `--compute` seconds in each forward, and
a worker sleeps as long for each pack as makes loading, over all workers, the share `--loading` of computing: what
waits is then the trainer and not this machine. `stock` counts the labels of a step in its batches, as transformers'
Trainer does, and so fetches them all, pixels and all, before the first forward; it runs with torch's two batches ahead
a worker and with a whole step ahead. The first step, in which workers start, is left out. Prints a Markdown table and
writes it to benchmarks/results/overlap.md.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_check.models import make_config, size_processor
from photo_packs import make_packs
from report import describe_machine, write_result

from open_qwen2vl import (
    OpenQwen2VLForConditionalGeneration,
    PackedTrainer,
    PackedTrainingArguments,
    PackingCollator,
)
from open_qwen2vl.data import PackMixture, parse_sources

VARIANTS = {
    "stock, 2 batches ahead": (False, 2),
    "stock, a step ahead": (False, None),
    "as they come, 2 batches ahead": (True, 2),
    "as they come, a step ahead (default)": (True, None),
}


class SlowPacks(PackMixture):
    """Packs that take `seconds` longer to load."""

    seconds = 0.0

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return super().__getitem__(index)


class CountedCollator(PackingCollator):
    """One of another class, whose labels the trainer counts itself before the first forward."""


def measure(packs: Path, as_they_come: bool, ahead: int | None, args: argparse.Namespace) -> float:
    """Share of the time in which the trainer waits for data."""
    processor = size_processor("tiny")
    data = SlowPacks(parse_sources(str(packs)), processor)
    data.seconds = args.compute * args.loading * args.workers
    config = make_config("tiny")
    config.image_token_id = processor.image_token_id
    options = PackedTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        max_steps=1 + args.steps,
        gradient_accumulation_steps=args.accumulation,
        dataloader_num_workers=args.workers,
        dataloader_prefetch_factor=ahead or -(-args.accumulation // args.workers),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PackedTrainer(
        OpenQwen2VLForConditionalGeneration._from_config(config, attn_implementation="packed_varlen"),
        options,
        PackingCollator() if as_they_come else CountedCollator(),
        train_dataset=data,
        processing_class=processor,
    )
    trainer.model.register_forward_pre_hook(lambda *_: time.sleep(args.compute))
    trainer.train()
    waits = [log["data_wait"] for log in trainer.state.log_history if "loss" in log][1:]
    return sum(waits) / len(waits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accumulation", type=int, default=16)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="measured, after one that is not")
    parser.add_argument("--compute", type=float, default=0.2, help="seconds a micro-batch")
    parser.add_argument("--loading", type=float, default=0.5, help="of all workers together, as a share of computing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        samples = 4 * args.accumulation * (1 + args.steps)  # about three a pack
        packs = make_packs(Path(folder), size_processor("tiny"), samples, 32, 32, max_length=128)
        rows = [(name, measure(packs, *variant, args)) for name, variant in VARIANTS.items()]
    table = [
        f"{args.accumulation} micro-batches of {args.compute} s a step; {args.workers} workers load them in "
        f"{args.loading:.0%} of that time.",
        "",
        "| micro-batches of a step | time waiting for data |",
        "|---|---|",
        *(f"| {name} | {share:.1%} |" for name, share in rows),
    ]
    write_result("overlap", table, describe_machine(f"python benchmarks/overlap.py {' '.join(sys.argv[1:])}".strip()))


if __name__ == "__main__":
    main()
