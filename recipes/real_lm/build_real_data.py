"""Step 2: drawings, photographs and texts that packages ship, each with a part that training never sees.

    the quickstart's tars  ->  emoji-train.tar, emoji-held-out.tar        "handshake: dark skin tone, light skin tone"
    three packages         ->  photos-train.tar, photos-held-out.tar      tiles of photographs: "a cup of espresso"
    Python's reference     ->  text-train.jsonl, text-held-out.json       prose about the language
    scikit-learn           ->  other-held-out.json                        prose about data sets, none of it trained on

Emoji: some of those that are drawn in skin tones, in the quickstart's own split, so that its tower has not seen the
held-out ones either. Photographs: square tiles, a quarter of them held out; a tile shows a part of a scene of which
the model knows other parts. Text: whole topics are held out, and what of them stands elsewhere word for word is not
trained on.
"""

import argparse
import importlib.util
import io
import json
import random
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from PIL import Image

from open_qwen2vl.files import new_folder, write_json
from open_qwen2vl.processing.images import decode_image

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from build_data import IMAGE_SIZE, Picture, limit_families, write_tar  # noqa: E402

# Photographs under CC0 or in the public domain, but for scikit-learn's two (CC BY 2.0, see README.md).
SKIMAGE = {
    "astronaut.png": "an astronaut in an orange suit",
    "brick.png": "a wall of bricks",
    "chelsea.png": "a tabby cat",
    "coffee.png": "a cup of espresso on a wooden table",
    "coins.png": "ancient coins",
    "grass.png": "a lawn seen from above",
    "gravel.png": "a path of gravel",
    "hubble_deep_field.jpg": "distant galaxies in a dark sky",
    "retina.jpg": "the retina of an eye",
    "rocket.jpg": "a rocket on its launch pad",
}
SKLEARN = {"china.jpg": "a Chinese temple under a blue sky", "flower.jpg": "a red flower"}
MATPLOTLIB = {"grace_hopper.jpg": "a naval officer in uniform"}
# Found without an import, which takes two seconds.
SKLEARN_DATA = Path(importlib.util.find_spec("sklearn").origin).with_name("datasets")
PIECE = 350  # characters, some 90 tokens, so that two or three share a pack
TILES_A_SIDE, HELD_OUT_FRACTION = 4, 4


def read_pictures(shards: list[Path]) -> list[Picture]:
    """The pictures of the quickstart's tars, by hexcode."""
    members: dict[str, dict[str, bytes]] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                members.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return [Picture(key, parts["txt"].decode(), parts["png"]) for key, parts in sorted(members.items())]


def choose_emoji(data: Path, limit: int | None, seed: int, validation: bool) -> tuple[list[Picture], list[Picture]]:
    """Training and held-out drawings of at most `limit` emoji that are drawn in tones; with `validation` one of the
    training drawings of each is held out, and the reported ones are on neither side.
    """
    held_out = read_pictures([data / "held-out.tar"])
    families = {picture.family for picture in limit_families(held_out, limit or len(held_out), seed)}
    train = [picture for picture in read_pictures(sorted(data.glob("train-*.tar"))) if picture.family in families]
    held_out = [picture for picture in held_out if picture.family in families]
    if validation:
        tones = {family: [p for p in train if p.family == family and p.has_tone] for family in sorted(families)}
        held_out = [random.Random(f"validation/{seed}/{name}").choice(drawn) for name, drawn in tones.items()]
        chosen = {picture.hexcode for picture in held_out}
        train = [picture for picture in train if picture.hexcode not in chosen]
    return train, held_out


def read_photographs(wheels: Path) -> Iterator[tuple[str, str, bytes]]:
    """Name, caption and file of each photograph."""
    with zipfile.ZipFile(next(iter(wheels.glob("scikit_image-*.whl")))) as wheel:
        for name, caption in SKIMAGE.items():
            yield name, caption, wheel.read(f"skimage/data/{name}")
    for folder, captions in (
        (SKLEARN_DATA / "images", SKLEARN),
        (Path(matplotlib.get_data_path(), "sample_data"), MATPLOTLIB),
    ):
        for name, caption in captions.items():
            yield name, caption, (folder / name).read_bytes()


def tiles(name: str, caption: str, data: bytes) -> list[Picture]:
    """The squares of which a photograph is made, row by row, at the size of the drawings; what is left over is not."""
    photograph = decode_image(data)
    side = min(photograph.size) // TILES_A_SIDE
    found = []
    for top in range(0, photograph.height - side + 1, side):
        for left in range(0, photograph.width - side + 1, side):
            tile = photograph.crop((left, top, left + side, top + side))
            png = io.BytesIO()
            tile.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(png, format="PNG")
            found.append(Picture(f"{Path(name).stem}_{top // side}_{left // side}", caption, png.getvalue()))
    return found


def cut_photographs(wheels: Path, seed: int, validation: bool) -> tuple[list[Picture], list[Picture]]:
    """Training tiles and held-out ones, a quarter of each photograph; with `validation` a quarter of the others."""
    train, held_out = [], []
    for name, caption, data in read_photographs(wheels):
        cut = tiles(name, caption, data)
        random.Random(f"{seed}/{name}").shuffle(cut)
        count = len(cut) // HELD_OUT_FRACTION
        held_out += cut[count : 2 * count] if validation else cut[:count]
        train += cut[2 * count if validation else count :]
    return train, held_out


def split_reference(seed: int, validation: bool) -> tuple[list[str], list[str]]:
    """Python's reference by topics: those to train on, and a fifth (with `validation` another one) to ask about."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(seed).shuffle(names)
    count = len(names) // 5
    reported, held_out = names[:count], names[count : 2 * count] if validation else names[:count]
    unseen = {" ".join(part.split()) for name in {*reported, *held_out} for part in topics[name].split("\n\n")}
    train = []
    for name in names[2 * count if validation else count :]:
        # Topics share paragraphs: the one on types holds that on integers.
        train.append("\n\n".join(part for part in topics[name].split("\n\n") if " ".join(part.split()) not in unseen))
    return [piece for text in train for piece in pieces(text)], [topics[name] for name in held_out]


def pieces(text: str) -> list[str]:
    """A text cut between lines, for a document is never cut: one that is longer than a pack would be left out."""
    found = [""]
    for line in text.splitlines(keepends=True):
        if len(found[-1]) + len(line) > PIECE:
            found.append("")
        found[-1] += line
    return [piece.strip("\n") for piece in found if piece.strip()]


def describe_data_sets() -> list[str]:
    """What scikit-learn says of the data sets that it knows."""
    return [file.read_text(encoding="utf-8") for file in sorted((SKLEARN_DATA / "descr").glob("*.rst"))]


def build(
    quickstart: Path, wheels: Path, output: Path, limit: int | None, seed: int = 0, validation: bool = False
) -> dict:
    """Choose, cut and write; a folder that is there already is left as it is.

    Args:
        quickstart (`Path`): `data/` of the quickstart.
        wheels (`Path`): folder with scikit-image's wheel.
        output (`Path`): folder of what is listed above; it appears whole or not at all.
        limit (`int` or `None`): emoji at most, each with all its tones.
        seed (`int`, *optional*, defaults to 0): of choice, splits and order.
        validation (`bool`, *optional*, defaults to `False`): hold out other pictures and texts than those of the
            report, which are on neither side then.

    Returns:
        `dict`: counts and options, also in `corpus.json`.

    Raises:
        ValueError: if a source is missing, or `output` was made with other options.
    """
    options = {"limit": limit, "seed": seed, "validation": validation}
    if (output / "corpus.json").exists():
        summary = json.loads((output / "corpus.json").read_text())
        if summary["options"] != options:
            raise ValueError(f"{output} was made with {summary['options']}, not {options}: delete it or name another")
        return summary
    if not (quickstart / "held-out.tar").exists() or not list(wheels.glob("scikit_image-*.whl")):
        raise ValueError(f"{quickstart} needs the quickstart's tars and {wheels} scikit-image's wheel: see run.sh")
    pictures = {
        "emoji": choose_emoji(quickstart, limit, seed, validation),
        "photos": cut_photographs(wheels, seed, validation),
    }
    summary: dict = {"options": options}
    with new_folder(output) as folder:
        for kind, (train, held_out) in pictures.items():
            random.Random(seed).shuffle(train)
            write_tar(folder / f"{kind}-train.tar", train)
            write_tar(folder / f"{kind}-held-out.tar", held_out)
            summary[kind] = {"train": len(train), "held_out": len(held_out)}
        train, held_out = split_reference(seed, validation)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in train)
        (folder / "text-train.jsonl").write_text(lines, encoding="utf-8")
        write_json(folder / "text-held-out.json", held_out)
        write_json(folder / "other-held-out.json", describe_data_sets())
        summary["text"] = {"train": len(train), "held_out": len(held_out)}
        write_json(folder / "corpus.json", summary)
    return summary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart/data"), help="the quickstart's tars")
    parser.add_argument("--wheels", type=Path, default=Path("runs/real_lm/wheels"), help="where run.sh puts wheels")
    parser.add_argument("--output", type=Path, default=Path("runs/real_lm/data"))
    parser.add_argument("--limit", type=int, help="use only so many emoji, each with all its tones")
    parser.add_argument("--seed", type=int, default=0, help="of choice, splits and order")
    parser.add_argument("--validation", action="store_true", help="hold out others than those of the report")
    args = parser.parse_args()
    try:
        summary = build(args.quickstart, args.wheels, args.output, args.limit, args.seed, args.validation)
    except ValueError as error:
        parser.error(str(error))
    counts = ", ".join(
        f"{kind} {summary[kind]['train']} + {summary[kind]['held_out']}" for kind in ("emoji", "photos")
    )
    print(f"for training and held out: {counts}, texts {summary['text']['train']} + {summary['text']['held_out']}")


if __name__ == "__main__":
    main()
