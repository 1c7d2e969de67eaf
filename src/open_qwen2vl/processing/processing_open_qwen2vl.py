"""Processor of Open-Qwen2VL: SigLIP's image transform, a Qwen2.5 tokenizer, the chat template, the image tokens.

An image is warped to the tower's square whatever its aspect ratio and stands in the text as `image_seq_length` times
`<|image_pad|>`. The budget is chosen per call and travels with the output, so that `generate(**inputs)` follows it.
This file travels with checkpoints: it imports installed libraries and its siblings only.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from .images import decode_image, to_rgb
from .text_formats import IMAGE_TOKEN, prepare_tokenizer

# Filters of SigLIP's image processors by the name that torch has for them.
TORCH_RESAMPLING = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


class OpenQwen2VLImagesKwargs(ImagesKwargs, total=False):
    """Image options of a processor call.

    image_seq_length (`int`, *optional*):
        Tokens per image, a square number; the processor's where not given.
    """

    image_seq_length: int


class OpenQwen2VLProcessorKwargs(ProcessingKwargs, total=False):
    """Options of a processor call."""

    images_kwargs: OpenQwen2VLImagesKwargs


class OpenQwen2VLProcessor(ProcessorMixin):
    """Images and text to model inputs.

    Args:
        image_processor (`SiglipImageProcessor` or `SiglipImageProcessorPil`):
            Bicubic warp to the tower's square, mean = std = 0.5. It always runs on Pillow, whose resize the original
            was trained with (torchvision's differs by one grey level here and there).
        tokenizer (`PreTrainedTokenizerBase`):
            A Qwen2.5 tokenizer after [`prepare_tokenizer`].
        chat_template (`str`, *optional*):
            Jinja template of a conversation.
        image_seq_length (`int`, *optional*, defaults to 144):
            Tokens per image where a call names none.
    """

    valid_processor_kwargs = OpenQwen2VLProcessorKwargs
    image_token = IMAGE_TOKEN
    skip_tensor_conversion = [*ProcessorMixin.skip_tensor_conversion, "image_seq_length"]

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, image_seq_length: int = 144):
        if not isinstance(image_processor, SiglipImageProcessorPil):
            # The Auto classes prefer the torchvision backend, also for what the Pillow one saved.
            image_processor = SiglipImageProcessorPil.from_dict(image_processor.to_dict())
        self.image_seq_length = image_seq_length
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str, text: str, image_seq_length: int = 144, **kwargs
    ) -> "OpenQwen2VLProcessor":
        """Build the processor of a new model.

        Args:
            vision (`str`): hub id or folder with SigLIP's image processor.
            text (`str`): hub id or folder with a Qwen2.5 tokenizer.
            image_seq_length (`int`, *optional*, defaults to 144): tokens per image where a call names none.
            kwargs: passed to both `from_pretrained` calls (`revision`, `token`, ...).

        Returns:
            [`OpenQwen2VLProcessor`] with the chat template of new models.

        Raises:
            ValueError: if the tokenizer lacks `<|im_end|>` or `<|image_pad|>`.
        """
        image_processor = SiglipImageProcessorPil.from_pretrained(vision, **kwargs)
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(text, **kwargs))
        tokenizer.chat_template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf8")
        return cls(
            image_processor, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=image_seq_length
        )

    @property
    def images_kwargs(self) -> dict[str, int]:
        """Defaults of a call's image options."""
        return {"image_seq_length": self.image_seq_length}

    def validate_inputs(self, images: ImageInput | None = None, text: list[str] | None = None, **kwargs) -> None:
        """Refuse a prompt whose placeholders and images differ in number, also where the totals agree.

        Args:
            images (`ImageInput`, *optional*): images, flat or one list per prompt.
            text (`list[str]`, *optional*): prompts.
            **kwargs: videos and audio, of which there are none.

        Raises:
            ValueError: with both numbers.
        """
        super().validate_inputs(images=images, text=text, **kwargs)
        nested = isinstance(images, list) and all(isinstance(own, list | tuple) for own in images)
        if not nested or text is None or len(images) != len(text):
            return
        for number, (prompt, own) in enumerate(zip(text, images, strict=True)):
            placeholders = prompt.count(self.image_token)
            if placeholders != len(own):
                raise ValueError(f"prompt {number} has {placeholders} {self.image_token} tokens and {len(own)} images")

    def _process_images(self, images: ImageInput, image_seq_length: int, **kwargs) -> tuple[BatchFeature, list[str]]:
        processed = self.image_processor(_to_rgb(images), **kwargs)
        number = len(make_flat_list_of_images(images))
        # One entry per image, as for every other output: servers cut a batch image by image.
        processed["image_seq_length"] = [image_seq_length] * number
        replacements = [self.replace_image_token(processed, i) for i in range(number)]
        return processed, replacements

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that stands for one image: as many placeholders as it has features."""
        return self.image_token * image_inputs["image_seq_length"][image_idx]

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """Placeholders and patches of images of the given (height, width), for vLLM's Transformers backend."""
        if image_sizes is None:
            return MultiModalData()
        image_seq_length = self._merge_kwargs(**kwargs)["images_kwargs"]["image_seq_length"]
        return MultiModalData(
            num_image_tokens=[image_seq_length] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def resize_images(self, images: list[Image.Image]) -> torch.Tensor:
        """The transform without its normalisation, which the model does on its own device.

        Args:
            images (`list[PIL.Image.Image]`): RGB images of any size; may be empty.

        Returns:
            `torch.Tensor` of shape `(images, 3, height, width)`, uint8.
        """
        size = self.image_processor.size
        # What the image processor does, without its way to arrays and back before it: the same pixels, sooner.
        resample = Image.Resampling(self.image_processor.resample)
        pixels = np.empty((len(images), size["height"], size["width"], 3), dtype=np.uint8)
        for number, image in enumerate(images):
            pixels[number] = image.resize((size["width"], size["height"]), resample)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def read_image(self, data: bytes) -> torch.Tensor:
        """One image file as training reads it: what `resize_images` gives of it, in about half the time.

        Torch's integer kernel makes images smaller, after which one pixel in 500 is a grey level off; for what
        decoding large JPEGs at a fraction changes see `decode_image` in images.py.

        Args:
            data (`bytes`): content of a JPEG, PNG or WebP file.

        Returns:
            `torch.Tensor` of shape `(1, 3, height, width)`, uint8.

        Raises:
            SampleError: for a file that cannot be used.
        """
        height, width = self.image_processor.size["height"], self.image_processor.size["width"]
        image = decode_image(data, min_size=(width, height))
        mode = TORCH_RESAMPLING.get(self.image_processor.resample)
        if mode is None or image.width < width or image.height < height:
            # Where it enlarges, torch differs by more, and small images take no time.
            return self.resize_images([image])
        # (height, width, 3) -> (1, 3, height, width), which torch takes for its fast, channels-last kernel
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return nn.functional.interpolate(pixels, (height, width), mode=mode, antialias=True).contiguous()


def _to_rgb(images: ImageInput) -> ImageInput:
    """Pillow images as training sees them (an alpha channel is dropped, not laid on white); arrays are left alone."""
    if isinstance(images, list | tuple):
        return [_to_rgb(image) for image in images]
    return to_rgb(images) if isinstance(images, Image.Image) else images


# `save_pretrained` writes this as auto_map, for readers with trust_remote_code=True and without this package.
OpenQwen2VLProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["OpenQwen2VLProcessor"]
