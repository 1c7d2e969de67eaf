"""What a tar that is not finished has got so far: a line for each batch, so that a killed run asks nothing twice.

The first line is the recipe. A line that a kill cut off is removed, and what it held is asked again.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...output_lock import local_state
from ...places import Place, is_remote

JOURNALS = ".unfinished"  # the folder of them, beside the score files


class Written(NamedTuple):
    """What a model wrote about a sample."""

    key: str
    uid: str  # 32 lower-case hex digits
    text: str | None  # as the model wrote it; None where it was not asked, or gave no answer
    is_whole: bool  # whether it came to its end
    reason: str | None  # why there is no text


class Journal:
    """The samples of a tar that are done, in its order."""

    def __init__(self, output: Place, recipe: dict[str, Any]):
        """`output` is the tar's score file; a `ValueError` if it was begun with another recipe."""
        self._path = journal_of(output)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.written: list[Written] = []
        lines, whole = self._lines(), 0
        for number, (entry, size) in enumerate(lines):
            if not number and entry != recipe:
                raise ValueError(
                    f"{self._path}: begun with other options or another tar; choose another --output or --name, "
                    f"or delete {self._path}"
                )
            self.written += [Written(*row) for row in entry] if number else []
            whole += size
        self._file = open(self._path, "ab")
        self._file.truncate(whole)
        if not whole:
            self._add(recipe)

    def add(self, written: list[Written]) -> None:
        """Keep some more samples; they are in the file when this returns."""
        self.written += written
        self._add(written)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _lines(self) -> Iterator[tuple[Any, int]]:
        """What the whole lines hold, and their bytes."""
        for line in self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else ():
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                return
            if entry is None:
                return
            yield entry, len(line)

    def _add(self, entry: Any) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()


def journal_of(output: Place) -> Path:
    """Where the journal of a score file is: beside it, or on this machine, for lines are added to a file."""
    if is_remote(output):
        return local_state(output) / f"{output.stem}.jsonl"
    return output.parent / JOURNALS / f"{output.stem}.jsonl"
