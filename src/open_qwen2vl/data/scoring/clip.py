"""The scorer `clip`: cosine similarity of image and caption by any model of open_clip (OpenAI's, DFN's, ...)."""

import threading
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...processing.images import MAX_PIXELS
from ...processing.sample_error import SampleError
from .pairs import RawPair, decode_pair
from .scoring import Scorer, find_device


class ClipScorer(Scorer):
    """Scores pairs with a model of open_clip, with the preprocessing and the tokenizer that belong to it.

    bfloat16 on a GPU, float32 on the CPU; the similarity itself is always computed in float32.

    Args:
        model (`str`): name of open_clip, as `ViT-B-32`, or `hf-hub:ORG/NAME`, or `local-dir:FOLDER`.
        pretrained (`str`, *optional*): for a name, a tag of open_clip or a file of weights.
        batch_size (`int`, *optional*, defaults to 256): pairs of a forward pass.
        device (`str`, *optional*): as torch names it; by default the worker's GPU, or the CPU without one.

    Raises:
        ValueError: without open_clip, or if it cannot make the model with weights.
    """

    parts = ("",)

    def __init__(self, model: str, pretrained: str | None = None, batch_size: int = 256, device: str | None = None):
        self.model = f"{model}/{pretrained}" if pretrained else model
        self.batch_size = batch_size
        self._device = find_device(device)
        precision = "bf16" if self._device.type == "cuda" else "fp32"
        self._dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        self.recipe = {"precision": precision}
        self._model, self._preprocess, self._tokenizer = _load(model, pretrained, precision, self._device)
        sides = self._model.visual.image_size
        self._image_size = max(sides) if isinstance(sides, (tuple, list)) else sides
        self._tokenizer_lock = threading.Lock()

    def prepare(self, pair: RawPair) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode, resize and tokenize.

        Args:
            pair ([`RawPair`]): as it stands in the tar.

        Returns:
            `tuple`: pixels of shape `(3, H, W)` in the model's dtype and int64 token ids of shape `(context,)`.

        Raises:
            SampleError: if the image cannot be used, `image_too_large` also for one so narrow that it would be too
                large with its smaller side at the model's image size.
        """
        image = decode_pair(pair).image
        if self._image_size**2 * max(image.size) / min(image.size) > MAX_PIXELS:
            raise SampleError("image_too_large", f"{image.width}x{image.height} pixels are too narrow to be resized")
        with self._tokenizer_lock:  # fast tokenizers refuse two threads at a time
            (tokens,) = self._tokenizer([pair.caption])
        return self._preprocess(image).to(self._dtype), tokens

    def collate(self, items: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Stack pixels and token ids, in pinned memory for a GPU."""
        stacked = tuple(torch.stack(column) for column in zip(*items, strict=True))
        return tuple(column.pin_memory() for column in stacked) if self._device.type == "cuda" else stacked

    @torch.inference_mode()
    def score(self, batch: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
        """Cosine similarities.

        Args:
            batch (`tuple`): from [`collate`].

        Returns:
            `np.ndarray` of shape `(items, 1)`, float64.
        """
        pixels, tokens = (column.to(self._device, non_blocking=True) for column in batch)
        image = F.normalize(self._model.encode_image(pixels).float(), dim=-1)
        text = F.normalize(self._model.encode_text(tokens).float(), dim=-1)
        return (image * text).sum(dim=-1, keepdim=True).double().cpu().numpy()


def _load(model: str, pretrained: str | None, precision: str, device: torch.device) -> tuple[Any, Any, Any]:
    """Model in evaluation mode, preprocessing and tokenizer."""
    try:
        import open_clip
    except ImportError as error:
        raise ValueError('--scorer clip needs open_clip: pip install "open-qwen2vl[data]"') from error
    named = f"--model {model}" + (f" --pretrained {pretrained}" if pretrained else "")
    if pretrained and model.startswith(("hf-hub:", "local-dir:")):
        raise ValueError(f"{named}: {model.split(':')[0]} brings its own weights, leave --pretrained out")
    try:
        network, preprocess = open_clip.create_model_from_pretrained(
            model, pretrained, precision=precision, device=device, weights_only=True
        )
        return network.eval(), preprocess, _load_tokenizer(open_clip, model)
    except Exception as error:  # of many kinds: RuntimeError, KeyError, UnpicklingError, errors of the hub
        raise ValueError(f"{named}: {error}") from error


def _load_tokenizer(open_clip: Any, model: str) -> Any:
    try:
        # A model's config may ask transformers to run code of its repository.
        return open_clip.get_tokenizer(model, trust_remote_code=False)
    except TypeError:  # open_clip's own tokenizer, which runs none and does not know the option
        return open_clip.get_tokenizer(model)
