"""The data side of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: documents over the processor that the checkpoint comes with.

Tokenizer, template and image processor stay as published. An image stands in the text as
`<|vision_start|><|image_pad|>...<|vision_end|>`; a document that is no conversation starts with its first entry and
ends in `<|endoftext|>`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from ...processing.conversations import has_generation_marks, named_chat_template
from ...processing.images import decode_image
from ...processing.processing_open_qwen2vl import TORCH_RESAMPLING
from ...processing.sample_error import SampleError
from ..interface import Media, TextFormat, VisionWork
from .boxes import box_form
from .images import image_patches
from .positions import mrope_positions
from .sizes import ImageSizes

# Conversations in which one template cannot look like another: with and without a system turn, images, several turns.
_TURN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}]}
_ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
_PROBES = [
    [_TURN, _ANSWER],
    [{"role": "system", "content": [{"type": "text", "text": "s"}]}, _TURN, _ANSWER, _TURN, _ANSWER],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
]


class QwenVLDocuments:
    """Lays out documents for Qwen2-VL, Qwen2.5-VL and Qwen3-VL; see [`DocumentProcessor`] for its methods.

    Images are brought between `min_pixels` and `max_pixels` (the image processor's own where not given), or all to a
    square of side `fixed_resolution`, for ablations.
    """

    needs_sizes = True
    rope_rows = 4
    plan_options = ("min_pixels", "max_pixels", "fixed_resolution")

    def __init__(
        self,
        processor: ProcessorMixin,
        chat_template: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        fixed_resolution: int | None = None,
    ):
        image_processor = processor.image_processor
        self.processor = processor
        self.image_processor = image_processor
        self.tokenizer = processor.tokenizer
        self.sizes = ImageSizes(
            image_processor.patch_size,
            image_processor.merge_size,
            image_processor.size["shortest_edge"] if min_pixels is None else min_pixels,
            image_processor.size["longest_edge"] if max_pixels is None else max_pixels,
            fixed_resolution,
        )
        tokens = ("<|vision_start|>", processor.image_token, "<|vision_end|>", "<|endoftext|>")
        # The whole vocabulary would take a tenth of a second.
        ids = [self.tokenizer.backend_tokenizer.token_to_id(token) for token in tokens]
        if missing := [token for token, found in zip(tokens, ids, strict=True) if found is None]:
            raise ValueError(f"the tokenizer has no {', '.join(missing)}; that of a Qwen2-VL checkpoint has")
        self._start, self.image_token_id, self._end, end_of_text = ids
        self.boxes = box_form(processor, self.sizes)
        self.text_format = TextFormat(document_start=(), document_end=(end_of_text,))
        self.chat_template = training_template(processor, chat_template)
        self.media_strings = {"image": f"<|vision_start|>{processor.image_token}<|vision_end|>"}
        self._mode = TORCH_RESAMPLING.get(image_processor.resample)
        if self._mode is None:
            raise ValueError(f"the image processor's resample {image_processor.resample!r} is not known here")

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the ids and counts of media."""
        sizes = self.sizes
        return {
            "family": "qwen_vl",
            "patch_size": sizes.patch_size,
            "merge_size": sizes.merge_size,
            "min_pixels": sizes.min_pixels,
            "max_pixels": sizes.max_pixels,
            "fixed_resolution": sizes.fixed_resolution,
            "boxes": self.boxes and self.boxes.name,
            "ids": [self._start, self.image_token_id, self._end, *self.text_format.document_end],
        }

    def placeholder_ids(self, media: Media) -> list[int]:
        """An image's tokens between its two marks; an aspect ratio above 200 is a SampleError."""
        return [self._start, *[self.image_token_id] * self.sizes.tokens(media.width, media.height), self._end]

    def read_media(self, data: bytes, media: Media) -> dict[str, torch.Tensor]:
        """`pixel_values` uint8 `(patches, 3 * P * P)` and `image_grid_thw` int64 `(1, 3)` of one image file."""
        image = decode_image(data)
        # Its placeholders are in the sequence by now: another size would need another number of them.
        if media.width and (image.width, image.height) != (media.width, media.height):
            raise SampleError(
                "image_changed", f"it has {image.width}x{image.height} pixels, planned {media.width}x{media.height}"
            )
        rows, columns = self.sizes.grid(image.width, image.height)
        return {
            "pixel_values": image_patches(image, self.sizes, self._mode),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }

    def empty_media(self) -> dict[str, torch.Tensor]:
        """The tensors of no image."""
        return {
            "pixel_values": torch.empty(0, 3 * self.sizes.patch_size**2, dtype=torch.uint8),
            "image_grid_thw": torch.empty(0, 3, dtype=torch.int64),
        }

    def position_ids(self, input_ids: np.ndarray, media: dict[str, torch.Tensor]) -> np.ndarray:
        """M-RoPE positions of one document, int64 `(4, S)`."""
        grids = media["image_grid_thw"].numpy()
        return mrope_positions(np.asarray(input_ids), self.image_token_id, grids, self.sizes.merge_size)

    def vision_work(self, media: Media) -> VisionWork:
        """An image is one attention segment; Qwen2.5-VL's windows are counted by [`QwenVL.step_flops`]."""
        rows, columns = self.sizes.grid(media.width, media.height)
        patches = rows * columns
        return VisionWork(patches, patches**2, patches // self.sizes.merge_size**2)

    def forward_options(self) -> dict[str, Any]:
        """None."""
        return {}


def training_template(processor: ProcessorMixin, name: str | None = None) -> str:
    """The processor's chat template with `{% generation %}` marks: its own, or ours where that renders the same."""
    own = named_chat_template(processor.chat_template, name)
    if has_generation_marks(own):
        return own
    templates = [path.read_text(encoding="utf8") for path in sorted(Path(__file__).parent.glob("*.jinja"))]
    # By name: Qwen2-VL's comes first, Qwen3-VL's second.
    if own is None:
        return templates[type(processor).__name__ == "Qwen3VLProcessor"]
    options = processor.tokenizer.special_tokens_map
    wanted = _render(own, options)
    for template in templates:
        if wanted is not None and _render(template, options) == wanted:
            return template
    raise ValueError(
        "the processor's chat template is not Qwen's own and has no {% generation %} marks, which say what is trained "
        "on: add them around the assistant's turns"
    )


def _render(template: str, options: dict[str, Any]) -> list[str] | None:
    try:
        return render_jinja_template(_PROBES, chat_template=template, **options)[0]
    # One that takes no system turn, say, refuses a probe: it is none of ours.
    except (TemplateError, TypeError, ValueError):
        return None
