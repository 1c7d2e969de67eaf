"""Is an evaluation text in a text: n-grams of words, as usual 13, and shorter texts of at least 8 words as a whole."""

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NGRAM, SHORTEST = 13, 8  # words
MOST_TEXTS = 10  # that one n-gram may stand in: more share a prompt's wording, and not a question
_WORD = re.compile(r"\w+")


class TextIndex(NamedTuple):
    """N-grams of evaluation texts."""

    hashes: np.ndarray  # uint64 (n-grams,), sorted
    owners: np.ndarray  # int64 (n-grams,), the text that each is of
    sizes: np.ndarray  # int64 (texts,), n-grams of each

    def best(self, text: str) -> tuple[float, int]:
        """Largest share of one evaluation text's n-grams that a text has, and which text; 0 and -1 without any."""
        asked = np.unique(np.array(ngrams(_WORD.findall(text.lower()), shorter=True), np.uint64))
        first = np.searchsorted(self.hashes, asked, "left")
        last = np.searchsorted(self.hashes, asked, "right")
        found = [self.owners[start:stop] for start, stop in zip(first, last, strict=True) if start < stop]
        if not found:
            return 0.0, -1
        owners, counts = np.unique(np.concatenate(found), return_counts=True)
        shares = counts / self.sizes[owners]
        return float(shares.max()), int(owners[shares.argmax()])


def ngrams(words: Sequence[str], shorter: bool = False) -> list[int]:
    """Hashes of 64 bits of all n-grams; of fewer words one of all, if they are `SHORTEST` or more.

    With `shorter` those of every length from `SHORTEST` on: what shorter evaluation texts are found by.
    """
    lengths = range(SHORTEST, NGRAM + 1) if shorter else (min(len(words), NGRAM),)
    return [
        int.from_bytes(hashlib.blake2b(" ".join(words[start : start + length]).encode(), digest_size=8).digest())
        for length in lengths
        if length >= SHORTEST
        for start in range(len(words) - length + 1)
    ]


def index_texts(texts: Sequence[str]) -> tuple[TextIndex, dict[str, int]]:
    """An index of evaluation texts, and how many of them are not in it, by reason."""
    left_out = {"text_too_short": 0, "only_common_words": 0}
    pieces = [np.unique(np.array(ngrams(_WORD.findall(text.lower())), np.uint64)) for text in texts]
    left_out["text_too_short"] = sum(not len(piece) for piece in pieces)
    hashes = np.concatenate([np.empty(0, np.uint64), *pieces])
    owners = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    rare = counts[inverse] <= MOST_TEXTS if len(hashes) else np.empty(0, bool)
    sizes = np.bincount(owners[rare], minlength=len(pieces))
    left_out["only_common_words"] = int((sizes == 0).sum()) - left_out["text_too_short"]
    return TextIndex(hashes[rare], owners[rare], sizes), {name: count for name, count in left_out.items() if count}
