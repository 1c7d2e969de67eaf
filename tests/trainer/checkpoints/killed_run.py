"""A training that `test_kills.py` kills: a fork of this process for each life, so that none waits for imports.

Usage: killed_run.py CONFIG.json, with `packs` (a list of {path, weight}), `model` (a folder) and `arguments`. For each
line `OUTPUT_DIR FILE_LIMIT` on stdin a child trains or resumes in OUTPUT_DIR and its process id is printed; then its
exit code as wait status. FILE_LIMIT (bytes, 0 for none) stands for a disk that is full. Every pack read is noted in
OUTPUT_DIR/reads.txt.
"""

import json
import os
import resource
import sys
import traceback
from pathlib import Path

import torch

from open_qwen2vl import PackedTrainer, PackedTrainingArguments
from open_qwen2vl.data.packing.mixture import PackMixture, parse_sources
from open_qwen2vl.trainer import run_recipe
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
    packs = NotedMixture(parse_sources(config["packs"]), processor)
    packs.notes = Path(args.output_dir) / "reads.txt"
    packs.notes.parent.mkdir(parents=True, exist_ok=True)
    return PackedTrainer(model=model, args=args, train_dataset=packs, processing_class=processor)


def live(config: dict, output_dir: str, file_limit: int) -> None:
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    args = PackedTrainingArguments(output_dir, use_cpu=True, disable_tqdm=True, **config["arguments"])
    run_recipe("killed_run.py", lambda: build_trainer(config, args), args)


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    for line in sys.stdin:
        output_dir, file_limit = line.split()
        child = os.fork()
        if child == 0:
            log = os.open(f"{output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = 1
            try:
                live(config, output_dir, int(file_limit))
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
