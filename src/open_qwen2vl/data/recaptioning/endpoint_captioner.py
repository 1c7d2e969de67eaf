"""Captions by a model behind an endpoint, so many requests at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...endpoint import AnswerError, Endpoint, image_part
from ...processing.images import decode_image, opened_image
from ...processing.sample_error import SampleError
from ..scoring.pairs import RawPair, check_sides, read_pairs
from ..storage.tars import Sample
from .captioners import CAPTION, asked, written_about
from .journal import Written

_ORIENTATION = 0x0112  # of EXIF


class EndpointCaptioner:
    """Asks the endpoint."""

    def __init__(self, endpoint: str, model: str, prompt: str, max_new_tokens: int, concurrency: int):
        self._endpoint = Endpoint(endpoint, model)
        self._prompt, self._concurrency = prompt, concurrency
        self._settings = {"temperature": 0, "max_tokens": max_new_tokens}
        self.made_with: dict[str, Any] = {}

    def captions(self, tar: Path, samples: Sequence[Sample]) -> Iterator[list[Written]]:
        """See [`Captioner`]; each sample is done by itself."""
        needs_caption, ahead = CAPTION in self._prompt, 2 * self._concurrency
        for sample in read_pairs(tar, samples, self._ask, self._concurrency, ahead, needs_caption):
            yield written_about([sample], [] if sample.reason else [sample.item])

    def _ask(self, pair: RawPair) -> tuple[str, bool]:
        content = [image_part(_sendable(pair.image)), {"type": "text", "text": asked(self._prompt, pair.caption)}]
        try:
            answer = self._endpoint.ask([{"role": "user", "content": content}], **self._settings)
        except AnswerError as error:
            raise SampleError(error.reason, str(error)) from error
        return answer.text, answer.is_whole


def _sendable(data: bytes) -> bytes | Image.Image:
    """An image that any server can read upright: the file as it is, or decoded."""
    image = decode_image(data)
    check_sides(image)
    with opened_image(data) as file:  # its header
        is_plain = file.format in ("JPEG", "PNG", "WEBP") and file.getexif().get(_ORIENTATION, 1) == 1
    return data if is_plain else image
