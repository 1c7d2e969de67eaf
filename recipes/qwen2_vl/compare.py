"""Last step: what the trained models make of pictures that they never saw, side by side.

    RUN/model + data/held-out.tar  ->  RUN/metrics.json for each run, and a table

A caption counts only if it is right to the letter. Blanked: the same with every picture replaced by mid-grey, which is
what the text alone gives away. A run at a fixed resolution is asked at that resolution.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl.processing.images import decode_image

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from report import Example, caption_examples, exact_match, read_examples, write_json  # noqa: E402

# What stands before a caption in training: the picture between its two marks, and nothing else.
PROMPT = "<|vision_start|><|image_pad|><|vision_end|>"


def resized(examples: list[Example], side: int) -> list[Example]:
    """The pictures squeezed to `side` x `side` pixels, as `pack --fixed-resolution` shows them in training."""
    squares = []
    for example in examples:
        png = io.BytesIO()
        image = decode_image(example.png)
        image.resize((side, side), Image.Resampling.BICUBIC).save(png, format="PNG")
        squares.append(Example(png.getvalue(), example.caption))
    return squares


def evaluate(run: Path, examples: list[Example], batch_size: int) -> dict:
    """Caption the held-out pictures with `run/model`; the figures also stand in `run/metrics.json`."""
    fixed = json.loads((run / "packs" / "plan.json").read_text())["vision"]["fixed_resolution"]
    model = AutoModelForImageTextToText.from_pretrained(run / "model", trust_remote_code=False).eval()
    processor = AutoProcessor.from_pretrained(run / "model", trust_remote_code=False)
    shown = resized(examples, fixed) if fixed else examples
    seen = caption_examples(model, processor, shown, batch_size, prompt=PROMPT)
    blanked = caption_examples(model, processor, shown, batch_size, blanked=True, prompt=PROMPT)
    training = json.loads((run / "train_results.json").read_text())
    metrics = {
        "held_out_exact_match": exact_match(seen),
        "held_out_right": sum(example.right for example in seen),
        "held_out_images": len(seen),
        "blanked_exact_match": exact_match(blanked),
        "fixed_resolution": fixed,
        "tokens": training["tokens"],
        "train_seconds": training["train_seconds"],
    }
    write_json(run / "metrics.json", metrics)
    return metrics


def table(rows: dict[str, dict]) -> str:
    """The figures of each run as a Markdown table."""
    lines = ["| run | held-out exact match | blanked | tokens trained | training, s |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        right = f"{row['held_out_exact_match']:.3f} ({row['held_out_right']} of {row['held_out_images']})"
        lines.append(
            f"| {name} | {right} | {row['blanked_exact_match']:.3f} | {row['tokens']:,} | {row['train_seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished trainings, each with its packs/")
    parser.add_argument("--data", type=Path, default=Path("runs/qwen2_vl/data"), help="folder of the tars")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    examples = read_examples(args.data / "held-out.tar")
    unfinished = [run for run in args.runs if not (run / "train_results.json").exists()]
    if unfinished:
        parser.error(f"{unfinished[0]} holds no finished training: run pretrain.py first")
    print(table({run.name: evaluate(run, examples, args.batch_size) for run in args.runs}))


if __name__ == "__main__":
    main()
