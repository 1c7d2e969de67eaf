"""Open-Qwen2VL to the pipeline: each image is warped to a square and takes the same number of positions.

With a tower of native resolution (SigLIP 2 NaFlex) it keeps its shape, and takes positions by it up to that number.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..processing.conversations import named_chat_template, training_chat_template
from ..processing.images import decode_pixels
from ..processing.sample_error import SampleError
from ..processing.text_formats import BOS_TOKEN, END_OF_CHUNK_TOKEN, EOS_TOKEN, IMAGE_TOKEN, TextFormat
from ..processing.tower_pixels import is_native, read_patches
from .interface import Media, VisionWork

if TYPE_CHECKING:
    from ..processing.processing_open_qwen2vl import OpenQwen2VLProcessor

DEFAULT_IMAGE_SEQ_LENGTH = 144
_NO_VIDEOS = "Open-Qwen2VL takes images; Qwen2-VL, 2.5 and 3 take videos"


class OpenQwen2VLDocuments:
    """The data side; a bare tokenizer after `prepare_tokenizer` is enough to plan, and cannot read images."""

    rope_rows = 1
    plan_options = ("image_seq_length",)
    media_strings = {"image": IMAGE_TOKEN}
    boxes = None  # it never saw any: a form would be an invention

    def __init__(
        self,
        processor: "OpenQwen2VLProcessor | PreTrainedTokenizerBase",
        chat_template: str | None = None,
        image_seq_length: int | None = None,
    ):
        if isinstance(processor, PreTrainedTokenizerBase):
            self.processor, self.tokenizer = None, processor
            self.chat_template = training_chat_template(processor, chat_template)
        else:
            self.processor, self.tokenizer = processor, processor.tokenizer
            self.chat_template = named_chat_template(processor.chat_templates, chat_template)
        if image_seq_length is None:
            image_seq_length = getattr(self.processor, "image_seq_length", DEFAULT_IMAGE_SEQ_LENGTH)
        self.image_seq_length = image_seq_length
        ids = self.tokenizer.convert_tokens_to_ids([BOS_TOKEN, EOS_TOKEN, END_OF_CHUNK_TOKEN, IMAGE_TOKEN])
        self.text_format = TextFormat(
            (ids[0],), (ids[1],), "\n", (ids[2],), (("<image>", "<image-placeholder>"),)
        )  # the original's rules
        self._block = [ids[3]] * image_seq_length
        # Then counts depend on the sizes of images, and the shapes are for the host.
        self.needs_sizes = self.processor is not None and is_native(self.processor.image_processor)
        self.host_names = ("image_shapes",) if self.needs_sizes else ()
        self.placeholder_names = {"image_positions": ids[3]}

    def fingerprint(self) -> dict[str, Any]:
        """See [`DocumentProcessor`]."""
        own = self.processor.image_processor if self.needs_sizes else None
        sizes = {name: getattr(own, name) for name in ("patch_size", "max_num_patches")} if own else {}
        return {"family": "open_qwen2vl", "image_seq_length": self.image_seq_length, **sizes}

    def describe_video(self, read: Callable[[int | None], bytes]) -> tuple[Media, bool]:
        """Images only."""
        raise SampleError("video_unsupported", _NO_VIDEOS)

    def placeholder_ids(self, media: Media) -> list[int]:
        """The budget, whatever the image, or by its shape; a video is a SampleError."""
        if media.kind == "video":
            raise SampleError("video_unsupported", _NO_VIDEOS)
        return self._block[: math.prod(self._shape(media)[2:])] if self.needs_sizes else self._block

    def _shape(self, media: Media) -> list[int]:
        return self.processor.image_shape(media.height, media.width, self.image_seq_length)

    def read_media(self, data: bytes, media: Media) -> dict[str, torch.Tensor]:
        """`pixel_values` uint8 `(1, 3, H, W)`, which the model normalises; of native resolution `image_shapes` int64
        `(1, 4)` with pixels `(1, patches, P * P * 3)`.
        """
        if not self.needs_sizes:
            return {"pixel_values": self.processor.read_image(data)}
        pixels = decode_pixels(data)
        height, width = pixels.shape[:2]
        # Its placeholders are in the sequence by now: another size would need another number of them.
        if (width, height) != (media.width, media.height):
            raise SampleError("image_changed", f"it has {width}x{height} pixels, planned {media.width}x{media.height}")
        shape = self._shape(media)
        patches = read_patches(self.processor.image_processor, pixels, shape)
        return {"pixel_values": patches, "image_shapes": torch.tensor([shape])}

    def keep_options(self) -> None:
        """Images only."""

    def sampled_frames(self, data: bytes, media: Media) -> tuple[np.ndarray, list[int]]:
        """Images only."""
        raise SampleError("video_unsupported", _NO_VIDEOS)

    def extract_frames(self, data: bytes, lossless: bool) -> bytes:
        """Images only."""
        raise SampleError("video_unsupported", _NO_VIDEOS)

    def empty_media(self) -> dict[str, torch.Tensor]:
        """`pixel_values` uint8 `(0, 3, H, W)`; of native resolution `(0, patches, P * P * 3)`, and no shapes."""
        if not self.needs_sizes:
            return {"pixel_values": self.processor.resize_images([])}
        own = self.processor.image_processor
        pixels = torch.zeros((0, own.max_num_patches, 3 * own.patch_size**2), dtype=torch.uint8)
        return {"pixel_values": pixels, "image_shapes": torch.zeros((0, 4), dtype=torch.int64)}

    def position_ids(self, input_ids: np.ndarray, media: dict[str, torch.Tensor]) -> np.ndarray:
        """`(1, S)`."""
        return np.arange(len(input_ids))[None]

    def vision_work(self, media: Media) -> VisionWork:
        """That of one square; without an image processor, which knows the square, an image counts as one patch."""
        if not self.needs_sizes:
            return VisionWork(1, 1, self.image_seq_length)
        high, wide, rows, columns = self._shape(media)
        return VisionWork(high * wide, (high * wide) ** 2, rows * columns)

    def forward_options(self) -> dict[str, Any]:
        """The budget, which the model cannot infer."""
        return {"image_seq_length": self.image_seq_length}
