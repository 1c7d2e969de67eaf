"""What two pictures that lie on each other have in common: outlines, colors, templates."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from open_qwen2vl.decontamination.pictures import WHOLE, thumbnails
from open_qwen2vl.decontamination.verification import LIMIT, MIN_CORNERS, corners, shown, similarity
from open_qwen2vl.decontamination.views import Unlike, views


def alike(one: Image.Image, other: Image.Image) -> float:
    return similarity(shown(thumbnails(one)[0]), thumbnails(other)[0], WHOLE)


def drawn(outline: str, inside: int = 0) -> Image.Image:
    """A white shape on black, with `inside` black marks in it."""
    image = Image.new("RGB", (160, 160))
    draw = ImageDraw.Draw(image)
    {"square": draw.rectangle, "circle": draw.ellipse}[outline]((30, 30, 130, 130), fill="white")
    random = np.random.default_rng(inside)
    for left, top in random.integers(45, 100, (inside, 2)).tolist():
        draw.rectangle((left, top, left + 8, top + 12), fill="black")
    return image


def test_an_outline_is_no_evidence():
    for outline in ("square", "circle"):
        assert corners(shown(thumbnails(drawn(outline))[0])) < MIN_CORNERS
        with pytest.raises(Unlike, match="too little"):
            views(drawn(outline))
        # The same outline around other marks, or around none.
        assert alike(drawn(outline, 12), drawn(outline)) < LIMIT
        assert alike(drawn(outline, 12), drawn(outline, 13)) < LIMIT
        assert alike(drawn(outline, 12), drawn(outline, 12)) == 1


def test_another_color_is_another_picture_and_a_grey_copy_is_none(evaluation_pictures):
    for picture in (evaluation_pictures[2], evaluation_pictures[-1]):
        red, green, blue = picture.split()
        turned = Image.merge("RGB", (blue, red, green))
        grey = [ImageOps.grayscale(image).convert("RGB") for image in (picture, turned)]
        assert alike(grey[0], picture) > 0.95
        assert alike(turned, picture) < LIMIT


def test_the_less_is_shown_the_less_may_be_covered(evaluation_pictures):
    rich, poor = evaluation_pictures[2], drawn("square", 6)
    shares = []
    for picture in (rich, poor):
        covered = picture.copy()
        ImageDraw.Draw(covered).rectangle((50, 50, 100, 100), fill=(200, 40, 40))
        shares.append(alike(covered, picture))
    assert shares[0] >= LIMIT > shares[1]


def test_a_mirrored_picture_is_shown_as_its_mirror_image(evaluation_pictures):
    picture = evaluation_pictures[2]
    one, other = shown(thumbnails(ImageOps.mirror(picture))[0]), shown(thumbnails(picture)[0]).mirrored()
    np.testing.assert_allclose(one.grey, other.grey, atol=0.05)
    np.testing.assert_allclose(one.color, other.color, atol=0.05)
