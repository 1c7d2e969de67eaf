"""Boxes drawn on an image."""

from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from ..families.interface import Box

# Of ColorBrewer's Set1, which also stand apart on photographs.
COLORS = ("#e41a1c", "#377eb8", "#4daf4a", "#984ea3", "#ff7f00", "#a65628", "#f781bf")


def draw_boxes(image: Image.Image, boxes: Iterable[Box], color: str | None = None) -> Image.Image:
    """A copy of an image with boxes and their labels drawn on it, in Pillow's own font, which has Latin letters only.

    Args:
        image (`PIL.Image.Image`): upright; any mode.
        boxes (`Iterable[Box]`): `(label, (left, top, right, bottom))` in pixels of it, as [`parse_boxes`] gives them;
            what is out of the image is drawn at its edge.
        color (`str`, *optional*): of all boxes, as Pillow knows colours; one for each label where not given.

    Returns:
        `PIL.Image.Image`: RGB, of the same size.
    """
    drawn = image.convert("RGB")
    drawn = drawn.copy() if drawn is image else drawn
    pen, width = ImageDraw.Draw(drawn), max(2, round(max(drawn.size) / 250))
    font = ImageFont.load_default(max(10, round(max(drawn.size) / 45)))
    colors: dict[str | None, str] = {}
    for label, (x1, y1, x2, y2) in boxes:
        edges = ((x1, drawn.width), (y1, drawn.height), (x2, drawn.width), (y2, drawn.height))
        corners = [min(max(at, 0), side - 1) for at, side in edges]
        own = color or colors.setdefault(label, COLORS[len(colors) % len(COLORS)])
        pen.rectangle(corners, outline=own, width=width)
        if label:
            left, top, right, bottom = pen.textbbox((0, 0), label, font=font)
            # Above the box, or in it where there is no room; never out of the image.
            x = max(0.0, min(corners[0], drawn.width - right - 2 * width))
            y = corners[1] - bottom - width if corners[1] > bottom + width else corners[1]
            pen.rectangle((x + left, y + top, x + right + 2 * width, y + bottom + width), fill=own)
            pen.text((x + width, y), label, fill="white", font=font)
    return drawn
