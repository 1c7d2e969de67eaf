"""Open-Qwen2VL to the pipeline: each image is warped to a square and takes the same number of positions."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..processing.conversations import named_chat_template, training_chat_template
from ..processing.sample_error import SampleError
from ..processing.text_formats import BOS_TOKEN, END_OF_CHUNK_TOKEN, EOS_TOKEN, IMAGE_TOKEN, TextFormat
from .interface import Media, VisionWork

if TYPE_CHECKING:
    from ..processing.processing_open_qwen2vl import OpenQwen2VLProcessor

DEFAULT_IMAGE_SEQ_LENGTH = 144
_NO_VIDEOS = "Open-Qwen2VL takes images; Qwen2-VL, 2.5 and 3 take videos"


class OpenQwen2VLDocuments:
    """The data side; a bare tokenizer after `prepare_tokenizer` is enough to plan, and cannot read images."""

    needs_sizes = False
    rope_rows = 1
    plan_options = ("image_seq_length",)
    media_strings = {"image": IMAGE_TOKEN}
    boxes = None  # it never saw any: a form would be an invention
    host_names = ()

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
        self.placeholder_names = {"image_positions": ids[3]}

    def fingerprint(self) -> dict[str, Any]:
        """See [`DocumentProcessor`]."""
        return {"family": "open_qwen2vl", "image_seq_length": self.image_seq_length}

    def describe_video(self, read: Callable[[int | None], bytes]) -> tuple[Media, bool]:
        """Images only."""
        raise SampleError("video_unsupported", _NO_VIDEOS)

    def placeholder_ids(self, media: Media) -> list[int]:
        """The budget, whatever the image; a video is a SampleError."""
        if media.kind == "video":
            raise SampleError("video_unsupported", _NO_VIDEOS)
        return self._block

    def read_media(self, data: bytes, media: Media) -> dict[str, torch.Tensor]:
        """`pixel_values` uint8 `(1, 3, H, W)`; the model normalises them."""
        return {"pixel_values": self.processor.read_image(data)}

    def keep_options(self) -> None:
        """Images only."""

    def sampled_frames(self, data: bytes, media: Media) -> tuple[np.ndarray, list[int]]:
        """Images only."""
        raise SampleError("video_unsupported", _NO_VIDEOS)

    def extract_frames(self, data: bytes, lossless: bool) -> bytes:
        """Images only."""
        raise SampleError("video_unsupported", _NO_VIDEOS)

    def empty_media(self) -> dict[str, torch.Tensor]:
        """`pixel_values` uint8 `(0, 3, H, W)`."""
        return {"pixel_values": self.processor.resize_images([])}

    def position_ids(self, input_ids: np.ndarray, media: dict[str, torch.Tensor]) -> np.ndarray:
        """`(1, S)`."""
        return np.arange(len(input_ids))[None]

    def vision_work(self, media: Media) -> VisionWork:
        """That of one square; without an image processor, which knows the square, an image counts as one patch."""
        return VisionWork(1, 1, self.image_seq_length)

    def forward_options(self) -> dict[str, Any]:
        """The budget, which the model cannot infer."""
        return {"image_seq_length": self.image_seq_length}
