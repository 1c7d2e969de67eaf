"""What writes captions: a model of transformers in this process, or one behind an endpoint."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...processing.sample_error import SampleError
from ..scoring.pairs import MAX_CAPTION, PreparedSample
from ..storage.tars import Sample
from .journal import Written

CAPTION = "{caption}"  # what stands in a prompt for the caption that a picture has


class Captioner(Protocol):
    """Writes about the pictures of a tar."""

    made_with: dict[str, Any]  # what the captions depend on beyond the options; json-able

    def captions(self, tar: Path, samples: Sequence[Sample]) -> Iterator[list[Written]]:
        """What is written about each sample, in order; a group is done as a whole."""


def asked(prompt: str, caption: str) -> str:
    """The prompt about a picture that has this caption; a [`SampleError`] `long_original` for an endless one."""
    if CAPTION in prompt and len(caption) > MAX_CAPTION:
        raise SampleError("long_original", f"{len(caption)} characters are above {MAX_CAPTION}")
    return prompt.replace(CAPTION, caption)


def written_about(group: list[PreparedSample], answers: Sequence[tuple[str, bool]]) -> list[Written]:
    """What became of some samples, given the text of each that was asked about, and whether it came to its end."""
    said = iter(answers)
    return [
        Written(sample.key, sample.uid, *(next(said) if sample.reason is None else (None, False)), sample.reason)
        for sample in group
    ]
