"""Processor of Open-Qwen2VL: the vision tower's pixels, a tokenizer, the chat template, the image tokens.

An image is warped to the tower's square whatever its aspect ratio and stands in the text as `image_seq_length` times
`<|image_pad|>`. The budget is chosen per call and travels with the output, so that `generate(**inputs)` follows it.
This file travels with checkpoints: it imports installed libraries and its siblings only.
"""

import base64
import inspect
import math
import os
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils import logging

from .images import array_to_rgb, decode_image, decode_pixels, to_rgb
from .rendering import check_conversation, limit_rendering
from .text_formats import IMAGE_TOKEN, prepare_tokenizer
from .tower_pixels import image_shape, is_native, on_pillow, tower_image_processor

logger = logging.get_logger(__name__)

# Transformers 5.19, which vLLM asks for, cannot do it.
_SANITIZES = "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters
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
    _defaults = {}  # read by transformers 5.19


class OpenQwen2VLProcessor(ProcessorMixin):
    """Images and text to model inputs.

    Args:
        image_processor (`SiglipImageProcessor` or `Siglip2ImageProcessor`, or either `...Pil`):
            Warp to the tower's square, or the image's own shape, with the tower's filter, mean and deviation. It
            always runs on Pillow, whose resize the original was trained with (torchvision's differs by one grey level
            here and there).
        tokenizer (`PreTrainedTokenizerBase`):
            A tokenizer after [`prepare_tokenizer`].
        chat_template (`str` or `dict[str, str]`, *optional*):
            Jinja template of a conversation, or several by name. The attribute `chat_template` is the one named
            `default`, `chat_templates` has all.
        image_seq_length (`int`, *optional*, defaults to 144):
            Tokens per image where a call names none; of native resolution the most.
        patches_per_side (`int`, *optional*):
            Side of the vision tower's patch grid, whose square is the most tokens that a call may name.

    Raises:
        ValueError: in a call, if `image_seq_length` is no square number or above the grid.
    """

    valid_processor_kwargs = OpenQwen2VLProcessorKwargs
    image_token = IMAGE_TOKEN
    skip_tensor_conversion = [*ProcessorMixin.skip_tensor_conversion, "image_seq_length"]

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_seq_length: int = 144,
        patches_per_side: int | None = None,
    ):
        image_processor = on_pillow(image_processor)
        self.patches_per_side = patches_per_side
        self.image_seq_length = self._model_image_seq_length = image_seq_length
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._named_templates = chat_template if isinstance(chat_template, dict) else {}
        default = self._named_templates.get("default", chat_template) if self._named_templates else chat_template
        super().__init__(image_processor, tokenizer, chat_template=default)

    @property
    def chat_templates(self) -> dict[str, str]:
        """All chat templates by name: `default` and, of processors made here, `chatml`, the one of new models."""
        default = self.chat_template
        return {
            **self._named_templates,
            **(default if isinstance(default, dict) else {"default": default} if default else {}),
        }

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *args, image_seq_length: int | None = None, **kwargs
    ) -> "OpenQwen2VLProcessor":
        """As in transformers; another `image_seq_length` than the model's travels with what a call returns."""
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if image_seq_length is not None:
            processor.image_seq_length = processor._budget(image_seq_length)
        return processor

    def save_pretrained(self, *args, **kwargs) -> list[str]:
        """As in transformers, with all named chat templates."""
        default, self.chat_template = self.chat_template, self.chat_templates or None
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.chat_template = default

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str, text: str, image_seq_length: int = 144, **kwargs
    ) -> "OpenQwen2VLProcessor":
        """Build the processor of a new model.

        Args:
            vision (`str`): hub id or folder with a vision tower's config and image processor.
            text (`str`): hub id or folder with a language model's tokenizer.
            image_seq_length (`int`, *optional*, defaults to 144): tokens per image where a call names none.
            kwargs: passed to both `from_pretrained` calls (`revision`, `token`, ...).

        Returns:
            [`OpenQwen2VLProcessor`] with the chat template of new models.

        Raises:
            ValueError: for a tokenizer that [`prepare_tokenizer`] refuses.
        """
        kwargs = {"trust_remote_code": False} | kwargs
        image_processor, grid = tower_image_processor(vision, **kwargs)
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(text, **kwargs))
        return cls.from_parts(image_processor, tokenizer, image_seq_length, patches_per_side=grid)

    @classmethod
    def from_parts(
        cls,
        image_processor: SiglipImageProcessorPil,
        tokenizer: PreTrainedTokenizerBase,
        image_seq_length: int,
        default_template: str = "chat_template.jinja",
        patches_per_side: int | None = None,
    ) -> "OpenQwen2VLProcessor":
        """A processor with the templates of this folder under their names, which pads on the left."""
        files = {"default": default_template, "chatml": "chat_template.jinja"}
        folder = Path(__file__).parent
        templates = {name: (folder / file).read_text(encoding="utf8") for name, file in files.items()}
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # what is saved is the latter
        tokenizer.chat_template = templates
        return cls(image_processor, tokenizer, templates, image_seq_length, patches_per_side)

    def _budget(self, image_seq_length: int | None) -> int:
        """The tokens an image takes, the processor's where a call names none; checked, or a server's engine would end.

        Processors that were saved without the grid's side know only that it must be a square number.
        """
        budget = self.image_seq_length if image_seq_length is None else image_seq_length
        if is_native(self.image_processor) and budget >= 1:
            return budget
        side = math.isqrt(max(budget, 0))
        if side * side != budget or not 1 <= side <= (self.patches_per_side or side):
            upper = f" between 1 and {self.patches_per_side**2}" if self.patches_per_side else ""
            raise ValueError(f"image_seq_length={budget} must be a square number{upper}")
        return budget

    def apply_chat_template(
        self,
        conversation: list,
        chat_template: str | None = None,
        *args,
        tokenize: bool = False,
        return_assistant_tokens_mask: bool = False,
        sanitize_control_tokens: bool | None = None,
        **kwargs,
    ) -> Any:
        """As in transformers; but what a user typed never becomes control tokens or images unless asked for.

        Args:
            conversation (`list`): messages, or several lists of them.
            chat_template (`str`, *optional*): a name of `chat_templates`, or a Jinja template; `default` if not given.
            args: as in transformers.
            tokenize (`bool`, *optional*, defaults to `False`): return ids instead of text.
            return_assistant_tokens_mask (`bool`, *optional*, defaults to `False`): with the ids, where answers are.
            sanitize_control_tokens (`bool`, *optional*): encode control tokens in messages as text; where not given
                it is done whenever transformers can do it: with `tokenize` and without the mask. Before 5.20 it
                cannot, which a warning says.
            kwargs: as in transformers.

        Returns:
            `str`, `list` or `BatchFeature`: as in transformers.

        Raises:
            ValueError: for a conversation that is empty or that the template refuses, and if the template does not
                come to an end.
        """
        check_conversation(conversation)
        if sanitize_control_tokens is None:
            sanitize_control_tokens = tokenize and not return_assistant_tokens_mask
        if _SANITIZES:
            kwargs["sanitize_control_tokens"] = sanitize_control_tokens
        elif sanitize_control_tokens:
            logger.warning_once("control tokens in messages stay such: this transformers cannot make them text")
        try:
            template = self._read_template(chat_template)
            limit_rendering(template)
            return super().apply_chat_template(
                conversation,
                template,
                *args,
                tokenize=tokenize,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                **kwargs,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def _read_template(self, chat_template: str | None) -> str:
        """The template of a name, or the one that is given."""
        found = self.chat_templates.get(chat_template or "default", chat_template)
        if not found:
            raise ValueError(f"the processor has no default chat template; by name {sorted(self.chat_templates)}")
        return found

    def prepare_inputs_layout(self, images: ImageInput | None = None, **kwargs) -> tuple:
        """Images of a call as training sees them, whatever they come as; no image at all is None."""
        if images is not None:
            images = read_images(images)
        return super().prepare_inputs_layout(images=images if _any_image(images) else None, **kwargs)

    def validate_inputs(self, images: ImageInput | None = None, text: list[str] | None = None, **kwargs) -> None:
        """Refuse a prompt whose placeholders and images differ in number, also where the totals agree."""
        super().validate_inputs(images=images, text=text, **kwargs)
        nested = isinstance(images, list) and all(isinstance(own, list | tuple) for own in images)
        if not nested or text is None or len(images) != len(text):
            return
        for number, (prompt, own) in enumerate(zip(text, images, strict=True)):
            placeholders = prompt.count(self.image_token)
            if placeholders != len(own):
                raise ValueError(f"prompt {number} has {placeholders} {self.image_token} tokens and {len(own)} images")

    def _process_images(
        self, images: ImageInput, image_seq_length: int | None = None, **kwargs
    ) -> tuple[BatchFeature, list[str]]:
        image_seq_length = self._budget(image_seq_length)
        processed = self.image_processor(images, **kwargs)
        if is_native(self.image_processor):
            shapes = [self.image_shape(*one.size[::-1], image_seq_length) for one in make_flat_list_of_images(images)]
            # The model sees by the shapes which patches are there.
            del processed["pixel_attention_mask"], processed["spatial_shapes"]
            processed["image_shapes"] = torch.tensor(shapes)
            return processed, [self.image_token * (rows * columns) for *_, rows, columns in shapes]
        number = len(make_flat_list_of_images(images))
        if image_seq_length != self._model_image_seq_length:
            # One entry per image, as for every other output: servers cut a batch image by image.
            processed["image_seq_length"] = [image_seq_length] * number
        return processed, [self.image_token * image_seq_length] * number

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """Placeholders and patches of images of the given (height, width), for vLLM's Transformers backend."""
        if image_sizes is None:
            return MultiModalData()
        options = self._merge_kwargs(self.valid_processor_kwargs, **kwargs)["images_kwargs"]
        image_seq_length = self._budget(options.get("image_seq_length"))
        tokens = [image_seq_length] * len(image_sizes)
        if is_native(self.image_processor):
            tokens = [math.prod(self.image_shape(*size, image_seq_length)[2:]) for size in image_sizes]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * len(image_sizes))

    def image_shape(self, height: int, width: int, image_seq_length: int) -> list[int]:
        """Patches, high and wide, and tokens, likewise, of an image of native resolution."""
        return image_shape(self.image_processor, height, width, image_seq_length)

    def resize_images(self, images: list[Image.Image]) -> torch.Tensor:
        """uint8 `(images, 3, height, width)`: the transform but for the normalisation, which the model does."""
        size = self.image_processor.size
        # What the image processor does, without its way to arrays and back before it: the same pixels, sooner.
        resample = Image.Resampling(self.image_processor.resample)
        pixels = np.empty((len(images), size["height"], size["width"], 3), dtype=np.uint8)
        for number, image in enumerate(images):
            pixels[number] = image.resize((size["width"], size["height"]), resample)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def read_image(self, data: bytes) -> torch.Tensor:
        """One image file as training reads it, `(1, 3, height, width)`: as `resize_images`, in about half the time.

        Torch's integer kernel makes images smaller, after which one pixel in 500 is a grey level off; for what
        decoding large JPEGs at a fraction changes see `decode_image` in images.py.
        """
        height, width = self.image_processor.size["height"], self.image_processor.size["width"]
        pixels = decode_pixels(data, min_size=(width, height))
        mode = TORCH_RESAMPLING.get(self.image_processor.resample)
        if mode is None or pixels.shape[0] < height or pixels.shape[1] < width:
            # Where it enlarges, torch differs by more, and small images take no time.
            return self.resize_images([Image.fromarray(pixels)])
        # (height, width, 3) -> (1, 3, height, width), which torch takes for its fast, channels-last kernel
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        return nn.functional.interpolate(tensor, (height, width), mode=mode, antialias=True).contiguous()


def read_images(images: ImageInput) -> ImageInput:
    """Images, or lists of them, as RGB Pillow images by the rules of training."""
    if isinstance(images, list | tuple):
        return [read_images(image) for image in images]
    if isinstance(images, str | os.PathLike):
        return decode_image(_read_source(os.fspath(images)))
    if isinstance(images, Image.Image):
        return to_rgb(images)
    if getattr(images, "ndim", 0) == 4:
        return [array_to_rgb(image) for image in images]
    return array_to_rgb(images)


def _read_source(source: str) -> bytes:
    """Bytes of an image by URL, path or as base64, as transformers understands them."""
    if source.startswith(("http://", "https://")):
        return httpx.get(source, follow_redirects=True, timeout=60).raise_for_status().content
    if os.path.isfile(source):
        return Path(source).read_bytes()
    try:
        return base64.b64decode(source.split(",", 1)[-1] if source.startswith("data:") else source, validate=True)
    except ValueError:
        raise ValueError(f"image {source[:80]!r}: no file of this name, no http(s) URL and no base64") from None


def _any_image(images: ImageInput | None) -> bool:
    return any(map(_any_image, images)) if isinstance(images, list) else images is not None


# `save_pretrained` writes this as auto_map, for readers with trust_remote_code=True and without this package.
OpenQwen2VLProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["OpenQwen2VLProcessor"]
