"""The scorer `clip`: cosine similarity of image and caption by any model of open_clip (OpenAI's, DFN's, ...)."""

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...processing.images import MAX_PIXELS
from ...processing.sample_error import SampleError
from .conversations import RawConversation
from .pairs import RawPair, decode_pair
from .scoring import Scorer, find_device

_SHOWN = 200  # characters of a question


class ClipScorer(Scorer):
    """Scores pairs with a model of open_clip, with the preprocessing and the tokenizer that belong to it.

    bfloat16 on a GPU, float32 on the CPU; the similarity itself is always computed in float32.
    """

    parts = ("",)

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        batch_size: int = 256,
        device: str | None = None,
        keep_embeddings: bool = False,
    ):
        self.model = f"{model}/{pretrained}" if pretrained else model
        self.batch_size = batch_size
        self._device = find_device(device)
        precision = "bf16" if self._device.type == "cuda" else "fp32"
        self._dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        self.recipe = {"precision": precision}
        self._model, self._preprocess = load_clip(model, pretrained, precision, self._device)
        self._tokenizer = _load_tokenizer(model)
        sides = self._model.visual.image_size
        self._image_size = max(sides) if isinstance(sides, (tuple, list)) else sides
        self._tokenizer_lock = threading.Lock()
        self.embeddings = self._embedding_size() if keep_embeddings else 0

    def prepare(self, pair: RawPair) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels `(3, H, W)` in the model's dtype and int64 token ids `(context,)`; or a [`SampleError`]."""
        image = decode_pair(pair).image
        if self._image_size**2 * max(image.size) / min(image.size) > MAX_PIXELS:
            raise SampleError("image_too_large", f"{image.width}x{image.height} pixels are too narrow to be resized")
        return self._preprocess(image).to(self._dtype), self._tokens(pair.caption)

    def collate(self, items: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """Stack pixels and token ids, in pinned memory for a GPU."""
        stacked = tuple(torch.stack(column) for column in zip(*items, strict=True))
        return tuple(column.pin_memory() for column in stacked) if self._device.type == "cuda" else stacked

    @torch.inference_mode()
    def score(self, batch: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
        """Cosine similarities, float64 `(items, 1)`; with embeddings those of image and text behind them."""
        pixels, tokens = (column.to(self._device, non_blocking=True) for column in batch)
        image, text = self._vectors(pixels, tokens)
        return self._found(image, text, text)

    def _vectors(self, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of unit length, in float32."""
        encoded = self._model.encode_image(pixels), self._model.encode_text(tokens)
        return tuple(F.normalize(vectors.float(), dim=-1) for vectors in encoded)

    @torch.inference_mode()
    def embed_images(self, images: Iterable[Image.Image]) -> np.ndarray:
        """Unit vectors of pictures, float32 `(images, numbers)`."""
        pixels = torch.stack([self._preprocess(image).to(self._dtype) for image in images]).to(self._device)
        return F.normalize(self._model.encode_image(pixels).float(), dim=-1).cpu().numpy()

    def _found(self, image: torch.Tensor, text: torch.Tensor, kept_text: torch.Tensor) -> np.ndarray:
        cosines = (image * text).sum(dim=-1, keepdim=True)
        found = torch.cat([cosines, image, kept_text], dim=-1) if self.embeddings else cosines
        return found.double().cpu().numpy()

    def _tokens(self, text: str) -> torch.Tensor:
        with self._tokenizer_lock:  # fast tokenizers refuse two threads at a time
            return self._tokenizer([text])[0]

    @torch.inference_mode()
    def _embedding_size(self) -> int:
        (tokens,) = self._tokenizer(["a"])
        return self._model.encode_text(tokens[None].to(self._device)).shape[-1]


class ConversationClipScorer(ClipScorer):
    """Image and text of a conversation: questions and answers, as much as the model's text tower takes.

    The text embeddings that are kept are those of the questions, by which conversations are told apart and grouped.
    """

    def prepare(self, conversation: RawConversation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
        """Pixels and token ids as of a pair, those of the questions, and these; or a [`SampleError`]."""
        said = " ".join(text for role, text in conversation.turns if role in ("user", "assistant"))
        asked = " ".join(conversation.questions.split())
        return *super().prepare(conversation.as_pair(said)), self._tokens(asked), asked

    def collate(self, items: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]]) -> tuple[torch.Tensor, ...]:
        """As of pairs."""
        return super().collate([item[:3] for item in items])

    def detail(self, item: tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]) -> str:
        """The questions."""
        return item[3][:_SHOWN]

    @torch.inference_mode()
    def score(self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> np.ndarray:
        """As of pairs."""
        pixels, said, asked = (column.to(self._device, non_blocking=True) for column in batch)
        image, text = self._vectors(pixels, said)
        return self._found(image, text, F.normalize(self._model.encode_text(asked).float(), dim=-1))


def load_clip(
    model: str, pretrained: str | None, precision: str, device: torch.device | str, option: str = "--model"
) -> tuple[torch.nn.Module, Any]:
    """A trained model of open_clip in evaluation mode, and its preprocessing; `option` names it in errors.

    Of a file of `torch.save` nothing but tensors is read.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(f'{option} {model} needs open_clip: pip install "open-qwen2vl[data]"') from error
    named = f"{option} {model}" + (f" --pretrained {pretrained}" if pretrained else "")
    if pretrained and model.startswith(("hf-hub:", "local-dir:")):
        raise ValueError(f"{named}: {model.split(':')[0]} brings its own weights, leave --pretrained out")
    try:
        network, preprocess = open_clip.create_model_from_pretrained(
            model, pretrained, precision=precision, device=device, weights_only=True
        )
        return network.eval(), preprocess
    except Exception as error:  # of many kinds: RuntimeError, KeyError, UnpicklingError, errors of the hub
        raise ValueError(f"{named}: {error}") from error


def _load_tokenizer(model: str) -> Any:
    import open_clip

    try:
        # A model's config may ask transformers to run code of its repository.
        return open_clip.get_tokenizer(model, trust_remote_code=False)
    except TypeError:  # open_clip's own tokenizer, which runs none and does not know the option
        return open_clip.get_tokenizer(model)
    except Exception as error:
        raise ValueError(f"--model {model}: {error}") from error
