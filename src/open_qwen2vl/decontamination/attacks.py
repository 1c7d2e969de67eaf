"""The self-test: evaluation pictures, changed as copies on the web are, are looked for among all of them."""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from ..processing.images import decode_image
from .views import Unlike

Like = Callable[[Image.Image], set[int]]  # the entries that a picture is taken for, or `Unlike`
_SMALL = 64  # pixels of the shorter side


class AttackCounts(NamedTuple):
    """What became of pictures that were changed in one way."""

    kind: str
    pictures: int  # that show enough when they are changed: a crop may be sky alone
    found: int  # of them recognised
    wrong: int  # other evaluation pictures that were taken for one of them, and are not taken for it unchanged

    @property
    def recall(self) -> float:
        """Part of the pictures that is recognised."""
        return self.found / max(1, self.pictures)

    @property
    def precision(self) -> float:
        """Part of the recognised that is right."""
        return self.found / max(1, self.found + self.wrong)


def _recoded(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return decode_image(buffer.getvalue())


def _small(image: Image.Image) -> Image.Image:
    scale = _SMALL / min(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return _recoded(image.resize(size, Image.Resampling.BICUBIC), 90) if scale < 1 else image


def _cropped(image: Image.Image, part: float, random: np.random.Generator) -> Image.Image:
    width, height = (max(1, round(side * part)) for side in image.size)
    left, top = random.integers(0, image.width - width + 1), random.integers(0, image.height - height + 1)
    return image.crop((int(left), int(top), int(left) + width, int(top) + height))


def _framed(image: Image.Image, random: np.random.Generator) -> Image.Image:
    color = tuple(int(value) for value in random.integers(0, 256, 3))
    sides = tuple(int(side * share) for side, share in zip(image.size * 2, random.uniform(0.02, 0.15, 4), strict=True))
    return ImageOps.expand(image, sides, color)


def _covered(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A box over 4 % of the picture, at a random place."""
    image, (width, height) = image.copy(), image.size
    left, top = int(random.uniform(0, 0.8) * width), int(random.uniform(0, 0.8) * height)
    color = tuple(int(value) for value in random.integers(0, 256, 3))
    ImageDraw.Draw(image).rectangle((left, top, left + width // 5, top + height // 5), fill=color)
    return image


def _written_on(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A line of outlined text, a twelfth of the picture high."""
    image, (width, height) = image.copy(), image.size
    place = (0.05 * width, random.uniform(0, 0.85) * height)
    size = max(6, height // 12)
    ImageDraw.Draw(image).text(
        place, "photo by somebody", fill="white", font_size=size, stroke_width=max(1, size // 12), stroke_fill="black"
    )
    return image


ATTACKS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "unchanged": lambda image, random: image,
    "JPEG 30": lambda image, random: _recoded(image, 30),
    "64 pixels": lambda image, random: _small(image),
    "crop to 90 %": lambda image, random: _cropped(image, 0.9, random),
    "crop to 80 %": lambda image, random: _cropped(image, 0.8, random),
    "crop to 70 %": lambda image, random: _cropped(image, 0.7, random),
    "mirrored": lambda image, random: ImageOps.mirror(image),
    "frame": _framed,
    "grey": lambda image, random: image.convert("L").convert("RGB"),
    "covered box": _covered,
    "text": _written_on,
    "mirrored, crop to 85 %, JPEG 50": lambda image, random: _recoded(
        ImageOps.mirror(_cropped(image, 0.85, random)), 50
    ),
}


def self_test(like: Like, samples: list[tuple[int, Image.Image]]) -> list[AttackCounts]:
    """Recall and precision of each kind of change, of entries with a picture of each; `like` looks for a picture."""
    twins: list[set[int]] = [like(image) for _, image in samples]
    counts = []
    for number, (kind, attack) in enumerate(ATTACKS.items()):
        random = np.random.default_rng(number)
        looked = found = wrong = 0
        for (entry, image), own in zip(samples, twins, strict=True):
            changed = attack(image, random)
            try:
                taken = like(changed)
            except Unlike:
                continue
            looked += 1
            # What is taken for it unchanged is the same picture under another name, or very like it.
            found += bool(taken & (own | {entry}))
            wrong += len(taken - own - {entry})
        counts.append(AttackCounts(kind, looked, found, wrong))
    return counts


def clean_alarms(like: Like, samples: list[tuple[int, Image.Image]]) -> list[tuple[int, int]]:
    """Entries whose unchanged picture is taken for that of another entry, and that entry: twins, or false alarms."""
    return [(entry, other) for entry, image in samples for other in sorted(like(image) - {entry})]
