"""Boxes from the text that a model writes."""

from transformers import ProcessorMixin

from ..families import document_processor
from ..families.interface import Box


def parse_boxes(text: str, processor: ProcessorMixin, image_size: tuple[int, int]) -> list[Box]:
    """Read the boxes of an answer, as the model's family writes them.

    Only patterns and JSON are looked for, nothing is evaluated. What is broken or cut off is read as far as it goes;
    coordinates beyond the image end at its edge, and a box whose second corner is left of or above the first is left
    out. Qwen2-VL's marks are special tokens: decode with `skip_special_tokens=False` to be sure which text is a label,
    for without them the text before a box in its line is taken.

    Args:
        text (`str`): what the model wrote; any text.
        processor (`ProcessorMixin`): the model's, whose family and limits of pixels say how boxes are written.
        image_size (`tuple[int, int]`): width and height in pixels of the upright image that was asked about.

    Returns:
        `list[Box]`: `(label, (left, top, right, bottom))` in pixels of that image, in the order of the text. The
        label is None where there is none. A coordinate is off by half a cell at most: 1/2000 of the side for Qwen2-VL
        and Qwen3-VL, half a pixel of the resized image for Qwen2.5-VL.

    Raises:
        ValueError: for a processor whose family has no form for boxes, and for a size without pixels.
    """
    width, height = image_size
    if width < 1 or height < 1:
        raise ValueError(f"image_size {image_size}: an image has at least one pixel")
    form = document_processor(processor).boxes
    if form is None:
        raise ValueError(f"{type(processor).__name__}: its family, or its tokenizer, has no form for boxes")
    return form.read(text, width, height)
