"""Scoring: pairs/s of `score --scorer clip` against a bare open_clip loop, and of the scorers without a model.

The bare loop has its batches decoded, tokenized and stacked in memory before the clock starts; `score` reads a tar,
decodes in threads, and writes the file. Both with the same model, loaded before, and the same batch size, in turns;
the best round of each counts, since other work on the machine only slows down. Without --model a small model with
random weights (ViT-S-32-alt of open_clip). Prints a table and writes it to benchmarks/results/data_scoring.md.

    OMP_NUM_THREADS=1 python benchmarks/data_scoring.py --num-workers 1     # one core for the model, one to decode
    python benchmarks/data_scoring.py --model ViT-L-14 --pretrained openai --pairs 20000 --batch-size 256
"""

import argparse
import functools
import io
import json
import os
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from report import describe_machine, write_result
from safetensors.torch import save_file

from open_qwen2vl.data.engine.engine import ShardTask
from open_qwen2vl.data.scoring.basic import BasicScorer
from open_qwen2vl.data.scoring.clip import ClipScorer
from open_qwen2vl.data.scoring.image_hash import TarHasher
from open_qwen2vl.data.scoring.pairs import read_pairs
from open_qwen2vl.data.scoring.scoring import TarScorer
from open_qwen2vl.data.storage.tars import index_shard

WORDS = "the a of on in and is are two red blue man woman dog street table picture shows image left right".split()


def write_pool(path: Path, pairs: int, side: int) -> None:
    """A tar of JPEGs of about the detail of a photograph, and captions of 5 to 20 words."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(pairs):
            coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
            picture = io.BytesIO()
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(picture, "JPEG", quality=90)
            caption = " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(5, 21)))
            for ext, content in (("jpg", picture.getvalue()), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number:08d}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_random_model(folder: Path, name: str) -> str:
    """A model of open_clip's sizes without trained weights."""
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip.get_model_config(name)}))
    save_file(open_clip.create_model(name).state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def bare_loop(model: torch.nn.Module, batches: list, device: torch.device) -> None:
    """What anyone would write around open_clip."""
    with torch.inference_mode():
        for pixels, tokens in batches:
            image = model.encode_image(pixels.to(device, non_blocking=True), normalize=True)
            text = model.encode_text(tokens.to(device, non_blocking=True), normalize=True)
            (image * text).sum(-1).cpu()


def measure(runs: dict[str, Callable[[], None]], pairs: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Pairs per second and CPU milliseconds per pair of each run, in its best round; the runs in turns."""
    taken = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter(), time.process_time()
            run()
            if number:  # the first round warms up
                taken[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return {
        name: (pairs / min(wall for wall, _ in times), 1000 * min(cpu for _, cpu in times) / pairs)
        for name, times in taken.items()
    }


def decoded_batches(scorer: ClipScorer, tar: Path) -> list:
    """All batches of a tar, in memory."""
    items = [sample.item for sample in read_pairs(tar, index_shard(tar).samples, scorer.prepare)]
    size = scorer.batch_size
    return [scorer.collate(items[start : start + size]) for start in range(0, len(items), size)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="of open_clip; where not given ViT-S-32-alt with random weights")
    parser.add_argument("--pretrained", help="tag or file")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--side", type=int, default=256, help="pixels of an image's side")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, nargs="+", default=[1], help="decoding threads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", help="default: the GPU, if there is one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pool(root / "0.tar", args.pairs, args.side)
        name = args.model or write_random_model(root, "ViT-S-32-alt")
        scorer = ClipScorer(name, args.pretrained, args.batch_size, args.device)
        task = ShardTask(root / "0.tar", root / "scores/0.parquet")
        workers = {
            f"`score --scorer clip --num-workers {n}`": TarScorer(lambda: scorer, "clip", {}, n)
            for n in args.num_workers
        }
        batches = decoded_batches(scorer, task.source)
        device = next(scorer._model.parameters()).device
        runs: dict[str, Callable[[], None]] = {
            "open_clip over decoded tensors": functools.partial(bare_loop, scorer._model, batches, device)
        }
        runs |= {title: functools.partial(worker, task) for title, worker in workers.items()}
        rates = measure(runs, args.pairs, args.rounds)
        others = {
            "`score --scorer basic`, one process": TarScorer(BasicScorer, "basic", {}, 0),
            "`score --scorer image-hash`, one process": TarHasher("image-hash", {}),
        }
        more = measure({title: functools.partial(w, task) for title, w in others.items()}, args.pairs, args.rounds)
    bare = next(iter(rates.values()))[0]
    table = ["| what | pairs/s | of the bare loop | CPU ms/pair |", "|---|---:|---:|---:|"]
    table += [f"| {title} | {rate:,.1f} | {rate / bare:.2f} | {cpu:.1f} |" for title, (rate, cpu) in rates.items()]
    table += [f"| {title} | {rate:,.0f} | | {cpu:.2f} |" for title, (rate, cpu) in more.items()]
    note = (
        f"{args.pairs} JPEGs of {args.side}x{args.side} pixels, batches of {args.batch_size}, "
        f"{args.model or 'ViT-S-32-alt with random weights'}, {device.type}, torch threads: "
        f"{torch.get_num_threads()}; the best of {args.rounds} rounds each. "
        f"Load of the machine over the last 15 minutes: {os.getloadavg()[2]:.1f}."
    )
    write_result("data_scoring", [*table, "", note], describe_machine(shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
