"""A training that `test_kills.py` kills.

Usage: killed_run.py CONFIG.json OUTPUT_DIR, with `packs` (a list of {path, weight}), `model` (a folder) and
`arguments` in the config, perhaps with a `cache` (a folder) of shards in a bucket. It trains or resumes in OUTPUT_DIR.
Every pack read is noted in OUTPUT_DIR/reads.txt.
With `held`, the name of a checkpoint, that one gets no name: OUTPUT_DIR/held tells when it is written.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from open_qwen2vl import PackedTrainer, PackedTrainingArguments
from open_qwen2vl.data import PackMixture, parse_sources
from open_qwen2vl.data.documents.documents import RANGES, Remote
from open_qwen2vl.data.storage.shard_cache import ShardCache
from open_qwen2vl.trainer import run_recipe
from open_qwen2vl.trainer.checkpoints import saving
from open_qwen2vl.trainer.model_loading import load_pretrained


class NotedMixture(PackMixture):
    """Notes which packs are read, after which step's checkpoint."""

    notes: Path

    def __getitem__(self, index: int) -> dict:
        with open(self.notes, "a") as file:
            file.write(f"{os.getpid()} {index}\n")
        return super().__getitem__(index)


def build_trainer(config: dict, args: PackedTrainingArguments) -> PackedTrainer:
    torch.manual_seed(0)
    model, processor = load_pretrained(config["model"], "float32", "packed_varlen")
    remote = Remote(cache=ShardCache(config["cache"], 10**6)) if "cache" in config else RANGES
    packs = NotedMixture(parse_sources(config["packs"]), processor, remote=remote)
    packs.notes = Path(args.output_dir) / "reads.txt"
    packs.notes.parent.mkdir(parents=True, exist_ok=True)
    return PackedTrainer(model=model, args=args, train_dataset=packs, processing_class=processor)


def hold(checkpoint: str) -> None:
    publish = saving.publish_folder

    def held(staged: Path, final: Path) -> None:
        if final.name == checkpoint:
            (final.parent / "held").touch()
            time.sleep(3600)
        publish(staged, final)

    saving.publish_folder = held


def main(config: str, output_dir: str) -> None:
    settings = json.loads(Path(config).read_text())
    if "held" in settings:
        hold(settings["held"])
    args = PackedTrainingArguments(output_dir, use_cpu=True, disable_tqdm=True, **settings["arguments"])
    run_recipe("killed_run.py", lambda: build_trainer(settings, args), args)


if __name__ == "__main__":
    main(*sys.argv[1:])
