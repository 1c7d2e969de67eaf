"""Files that are there as a whole or not at all: written under another name and renamed.

A killed run leaves `NAME.PID.tmp` beside `NAME`; the next run removes it.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def renamed_when_whole(path: Path) -> Iterator[Path]:
    """A temporary name for a file, which gets its own at the end of the block.

    Args:
        path (`Path`): the file; one of that name is replaced.

    Yields:
        `Path`: where to write; removed if the block raises.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Remove what a killed run left half-written.

    Args:
        paths (`Iterable[Path]`): names of the files as they are when whole; their folders need not exist.
    """
    names: dict[Path, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(path.name)
    for folder, whole in names.items():
        for temporary in folder.glob("*.tmp"):
            if temporary.name.rsplit(".", 2)[0] in whole:
                temporary.unlink(missing_ok=True)
