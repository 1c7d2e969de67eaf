"""A third family: images of w x h pixels take one position for each 8 x 8 of them, between two marks; 2 rows of
positions; media in two tensors. Nothing but this file is needed for its data."""

from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from open_qwen2vl.families.interface import Media, VisionWork
from open_qwen2vl.processing.images import decode_image
from open_qwen2vl.processing.sample_error import SampleError
from open_qwen2vl.processing.text_formats import TextFormat

PATCH = 8
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<s><|image_pad|><|im_start|>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% else %}{% generation %}{{ m.content[0].text }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}"
)


class ToyProcessor:
    """As much of a processor as a pipeline meets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, most: int = 64):
        self.tokenizer, self.most = tokenizer, most


class ToyDocuments:
    """The data side."""

    needs_sizes = True
    rope_rows = 2
    placeholder_names: ClassVar[dict[str, int]] = {}
    plan_options = ("most",)
    chat_template = TEMPLATE
    media_strings = {"image": "<s><|image_pad|><|im_start|>"}
    boxes = None
    host_names = ()

    def __init__(self, processor: ToyProcessor, chat_template: str | None = None, most: int | None = None):
        self.tokenizer, self.most = processor.tokenizer, most or processor.most
        self._start, self._pad, self._end = self.tokenizer.convert_tokens_to_ids(
            ["<s>", "<|image_pad|>", "<|im_start|>"]
        )
        self.text_format = TextFormat((), (self.tokenizer.convert_tokens_to_ids("<|im_end|>"),))

    def fingerprint(self) -> dict[str, Any]:
        return {"family": "toy", "patch": PATCH, "most": self.most}

    def placeholder_ids(self, media: Media) -> list[int]:
        number = self.vision_work(media).tokens
        if number > self.most:
            raise SampleError("too_many_patches", f"{number} patches")
        return [self._start, *[self._pad] * number, self._end]

    def read_media(self, data: bytes, media: Media) -> dict[str, torch.Tensor]:
        image = decode_image(data)
        if image.size != (media.width, media.height):
            raise SampleError("image_changed", f"{image.size}, planned {media.width}x{media.height}")
        rows, columns = image.height // PATCH, image.width // PATCH
        colour = torch.tensor(image.getpixel((0, 0)), dtype=torch.uint8)
        return {"patches": colour.expand(rows * columns, 3), "grids": torch.tensor([[rows, columns]])}

    def empty_media(self) -> dict[str, torch.Tensor]:
        return {"patches": torch.empty(0, 3, dtype=torch.uint8), "grids": torch.empty(0, 2, dtype=torch.int64)}

    def position_ids(self, input_ids: np.ndarray, media: dict[str, torch.Tensor]) -> np.ndarray:
        return np.stack([np.arange(len(input_ids)), np.cumsum(input_ids != self._pad)])

    def vision_work(self, media: Media) -> VisionWork:
        patches = (media.width // PATCH) * (media.height // PATCH)
        return VisionWork(patches, patches**2, patches)

    def forward_options(self) -> dict[str, Any]:
        return {}
