"""Captions of `recaption` in place of those of the pool: of some samples, drawn by their uids."""

import hashlib
from collections.abc import Sequence

import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...places import Place, arrow_source
from ..scoring.score_files import find_score_files, read_score_metadata


def find_captions(paths: Sequence[str | Place]) -> dict[str, Place]:
    """The files of `recaption` by the stem of their tar; a `ValueError` for other files, and for two of one name."""
    found: dict[str, Place] = {}
    for file in find_score_files(paths):
        if read_score_metadata(file).get("recipe", {}).get("scorer") != "recaption":
            raise ValueError(f"--captions {file}: no captions, as open-qwen2vl recaption writes them")
        if (other := found.setdefault(file.stem, file)) is not file:
            raise ValueError(f"--captions: {other} and {file} are both of a tar {file.stem}")
    return found


class NewCaptions:
    """Which samples get a new caption, and which one."""

    def __init__(self, files: dict[str, Place], share: float, seed: int):
        self._files, self._share, self._seed = files, share, seed

    def of(self, tar: Place, uids: Sequence[str]) -> tuple[list[bool], list[str | None]]:
        """Whether each of some samples of a tar is drawn, and the caption of those that are and have one."""
        captions: dict[str, str] = {}
        if tar.stem in self._files:
            table = pq.read_table(arrow_source(self._files[tar.stem]), columns=["uid", "value", "detail"])
            table = table.filter(pc.is_valid(table["value"]))
            captions = dict(zip(table["uid"].to_pylist(), table["detail"].to_pylist(), strict=True))
        drawn = [self._is_drawn(uid) for uid in uids]
        return drawn, [captions.get(uid) if own else None for own, uid in zip(drawn, uids, strict=True)]

    def _is_drawn(self, uid: str) -> bool:
        digest = hashlib.sha256(f"{self._seed}:caption:{uid}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self._share * 2**64
