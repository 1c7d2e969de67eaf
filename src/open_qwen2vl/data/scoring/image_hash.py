"""The scorer `image-hash`: not a value but what duplicates are found by, a hash of the file and one of the picture."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

from ...files import describe_shard
from ..engine.engine import Outcome, ShardTask
from ..storage.tars import index_shard
from .pairs import RawPair, decode_pair, read_pairs
from .score_files import HASH_SCHEMA, score_table
from .scoring import write_tar_scores

_MODEL = "imagehash/phash-8x8"


class TarHasher:
    """Hashes the images of one tar after the other, for one worker of the engine."""

    def __init__(self, name: str, recipe: dict[str, Any]):
        try:
            import imagehash
        except ImportError as error:
            raise ValueError('--scorer image-hash needs imagehash: pip install "open-qwen2vl[data]"') from error
        self._name = name
        self._recipe = recipe
        self._phash = imagehash.phash

    def __call__(self, task: ShardTask) -> Outcome:
        """Hash the images of a tar."""
        index = index_shard(task.source)
        samples = list(read_pairs(task.source, index.samples, self._hash))
        keys, uids, hashes, reasons = zip(*samples, strict=True) if samples else ((),) * 4
        values = np.full((len(samples), 1), np.nan)
        table = score_table([self._name], _MODEL, keys, uids, values, reasons, None)
        for name, column in zip(("bytes_hash", "phash"), _columns(hashes), strict=True):
            table = table.append_column(HASH_SCHEMA.field(name), column)
        skipped = index.skipped + [(sample.key, sample.reason) for sample in samples if sample.reason]
        recipe = {**self._recipe, "source": describe_shard(task.source, task.output.parent)}
        return write_tar_scores(task, table, len(samples) + len(index.skipped), skipped, recipe, {})

    def _hash(self, pair: RawPair) -> tuple[int, int]:
        bits = self._phash(decode_pair(pair).image).hash
        file_hash = hashlib.sha256(pair.image).digest()[:8]
        return int.from_bytes(file_hash, "big"), int.from_bytes(np.packbits(bits).tobytes(), "big")


def _columns(hashes: tuple[tuple[int, int] | None, ...]) -> list[pa.Array]:
    return [pa.array([pair and pair[i] for pair in hashes], pa.uint64()) for i in range(2)]
