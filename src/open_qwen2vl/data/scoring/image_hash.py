"""The scorer `image-hash`: not a value but what duplicates are found by, a hash of the file and one of the picture."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from ...processing.images import decode_image
from ..engine.engine import Outcome, ShardTask
from .conversations import RawConversation
from .pairs import RawPair, read_tar
from .score_files import HASH_SCHEMA, score_table
from .scoring import describe_source, write_tar_scores

_MODEL = "imagehash/phash-8x8"


class TarHasher:
    """Hashes the images of one tar after the other, for one worker of the engine."""

    def __init__(self, name: str, recipe: dict[str, Any], read: Callable[..., Any] = read_tar):
        try:
            import imagehash
        except ImportError as error:
            raise ValueError('--scorer image-hash needs imagehash: pip install "open-qwen2vl[data]"') from error
        self._name = name
        self._recipe, self._read = recipe, read
        self._phash = imagehash.phash

    def __call__(self, task: ShardTask) -> Outcome:
        """Hash the images of a tar."""
        with self._read(task, self._hash) as (found, damage):
            samples = list(found)
        keys, uids, hashes, reasons = zip(*samples, strict=True) if samples else ((),) * 4
        values = np.full((len(samples), 1), np.nan)
        table = score_table([self._name], _MODEL, keys, uids, values, reasons, None)
        for name, column in zip(("bytes_hash", "phash"), _columns(hashes), strict=True):
            table = table.append_column(HASH_SCHEMA.field(name), column)
        skipped = damage + [(sample.key, sample.reason) for sample in samples if sample.reason]
        recipe = {**self._recipe, "source": describe_source(task)}
        return write_tar_scores(task, table, len(samples) + len(damage), skipped, recipe, {})

    def _hash(self, pair: RawPair | RawConversation) -> tuple[int, int]:
        if isinstance(pair, RawPair):
            return _number(pair.image), self._picture(pair.image)
        # Conversations are the same if their pictures and their questions are.
        asked = " ".join(pair.questions.casefold().split()).encode()
        pictures = [self._picture(image) for image in pair.images]
        # A number of the question, and of further pictures, turns bits: of other questions half of them differ.
        turned = _number(asked + b"".join(picture.to_bytes(8, "big") for picture in pictures[1:]))
        files = b"".join(hashlib.sha256(image).digest() for image in pair.images)
        return _number(files + asked), (pictures[0] if pictures else 0) ^ turned

    def _picture(self, image: bytes) -> int:
        return int.from_bytes(np.packbits(self._phash(decode_image(image)).hash).tobytes(), "big")


def _number(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _columns(hashes: tuple[tuple[int, int] | None, ...]) -> list[pa.Array]:
    return [pa.array([pair and pair[i] for pair in hashes], pa.uint64()) for i in range(2)]
