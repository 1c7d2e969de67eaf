"""The scorer `concepts`: which things of a list a caption names, for `balance` in the filter; no image is opened."""

import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

from .conversations import RawConversation
from .pairs import RawPair
from .score_files import SEPARATOR
from .scoring import Scorer

SHIPPED = Path(__file__).with_name("concepts.txt")
MOST_BYTES = 256 << 20  # of a file of concepts
_SIBILANT = re.compile(r"(s|x|z|ch|sh)$")


class ConceptScorer(Scorer):
    """How many concepts a caption names, and which.

    A concept is found as a whole word or words, in any case, also in its plural; all that a caption names count, also
    within each other ("hot dog" and "dog").
    """

    parts = ("",)
    batch_size = 4096

    def __init__(self, concepts: str | None = None):
        try:
            import ahocorasick_rs
        except ImportError as error:
            raise ValueError('--scorer concepts needs ahocorasick_rs: pip install "open-qwen2vl[curate]"') from error
        path = Path(concepts) if concepts else SHIPPED
        self.model = path.name
        self.concepts = read_concepts(path)
        forms = {form: number for number, name in enumerate(self.concepts) for form in _forms(name)}
        forms |= {name: number for number, name in enumerate(self.concepts)}  # "glasses" is itself, not two a "glass"
        self._numbers = list(forms.values())
        self._automaton = ahocorasick_rs.AhoCorasick(list(forms))
        self.recipe: dict[str, Any] = {"concepts": len(self.concepts)}

    def prepare(self, pair: RawPair | RawConversation) -> list[str]:
        """The concepts of a caption, or of all that is said, each once, in the list's order."""
        said = pair.caption if isinstance(pair, RawPair) else pair.transcript
        text = " ".join(_folded(said).split())
        found = {
            self._numbers[form]
            for form, start, stop in self._automaton.find_matches_as_indexes(text, overlapping=True)
            if not (start and text[start - 1].isalnum()) and not (stop < len(text) and text[stop].isalnum())
        }
        return [self.concepts[number] for number in sorted(found)]

    def detail(self, item: list[str]) -> str:
        """The concepts, as the filter reads them."""
        return SEPARATOR.join(item)

    def score(self, batch: list[list[str]]) -> np.ndarray:
        """Number of concepts, float64 `(items, 1)`."""
        return np.array([[len(item)] for item in batch], np.float64)


def read_concepts(path: Path) -> list[str]:
    """The names of a file, one a line in lower case, each once and sorted; lines that begin with `#` are comments.

    A `ValueError` for a file without any, one that is no text, or a name with a comma.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"--concepts {path}: larger than {MOST_BYTES >> 20} MiB")
        lines = _folded(path.read_text(encoding="utf-8-sig")).splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--concepts {path}: no text of UTF-8: {error}") from error
    names = {" ".join(line.split()) for line in lines if not line.startswith("#")} - {""}
    if not names:
        raise ValueError(f"--concepts {path}: no concept in it; a name a line")
    if wrong := next((name for name in sorted(names) if "," in name), None):
        raise ValueError(f"--concepts {path}: {wrong[:80]!r} has a comma; a concept is one name on its line")
    return sorted(names)


def _folded(text: str) -> str:
    """In lower case, and an accent as part of its letter (NFC), which some editors write behind it."""
    return unicodedata.normalize("NFC", text.lower())


def _forms(name: str) -> list[str]:
    """A name's plurals, by English rules."""
    if name.endswith("man"):
        return [name[:-3] + "men"]
    if _SIBILANT.search(name):
        return [name + "es"]
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return [name[:-1] + "ies"]
    return [name + "s"]
