"""Options of the step `decontaminate`."""

from dataclasses import dataclass
from typing import Literal

from ..options import option


@dataclass(frozen=True)
class DecontaminateOptions:
    """What is looked for, and where: the options of `open-qwen2vl decontaminate`.

    Raises:
        ValueError: for an option out of its range.
    """

    pool: tuple[str, ...] = option(
        help="WebDataset tars of captions, or folders of them; conversations as pack takes them (.json, .jsonl, "
        ".parquet)",
        positional=True,
        metavar="POOL",
    )
    against: tuple[str, ...] = option(
        help="evaluation sets: pictures, parquet or arrow tables, tars, folders of all these, tasks of lmms-eval "
        "whose data are on this machine; NAME=SET gives another name",
        metavar="SET",
    )
    output: str = option(help="the scores go to DIR/contaminated/TAR.parquet", metavar="DIR")
    images: tuple[str, ...] = option(
        (),
        help="of conversations, where images are that are named by a path: a folder, an uncompressed .tar or a .zip; "
        "may be repeated (default for tables: their own folder)",
        metavar="DIR_OR_ARCHIVE",
        form="repeated",
    )
    embeddings: tuple[str, ...] = option(
        (),
        help="scores of this pool that were made by score --scorer clip --keep-embeddings: pictures of the sets are "
        "looked for by that model's embeddings too; may be repeated",
        metavar="SCORES",
        form="repeated",
    )
    self_test: int = option(
        200, help="evaluation pictures that are changed in known ways and looked for, to tell the recall", metavar="N"
    )
    num_workers: int | None = option(None, help="processes (default: one per core)", metavar="N")
    engine: Literal["local", "ray"] = option("local", help="where")

    def __post_init__(self):
        if not self.against:
            raise ValueError("--against needs at least one set")
        if self.self_test < 0:
            raise ValueError(f"--self-test must be at least 0, got {self.self_test}")
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"--num-workers must be at least 1, got {self.num_workers}")
