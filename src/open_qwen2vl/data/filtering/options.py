"""Options of the step `filter`."""

from dataclasses import dataclass
from typing import Literal

from ...options import flag, option
from ...places import Place, place

MAX_DISTANCE = 8  # bits in which the hashes of near duplicates may differ


@dataclass(frozen=True)
class FilterOptions:
    """What is filtered, and how: the options of `open-qwen2vl filter`.

    Raises:
        ValueError: for an option out of its range.
    """

    scores: tuple[str, ...] = option(help="score files, or folders of them", positional=True, metavar="SCORES")
    output: str = option(
        help="the uids of the pairs that stay, sorted; a rerun makes it anew, and only one filter at a time does",
        metavar="FILE.npy",
    )
    keep: str | None = option(None, help="which pairs stay, see below", metavar="EXPR")
    sql: str | None = option(
        None,
        help="in place of --keep one SELECT of DuckDB whose column uid names the pairs that stay, from the table "
        'scores: uid, a column for each score, as "basic.words", and its "NAME.detail" if it has one; files, network '
        "and settings are out of its reach",
        metavar="SELECT",
    )
    pool: tuple[str, ...] = option(
        (),
        help="tars, or folders of them, with the report's pictures (default: those that the score files name)",
        metavar="TAR",
    )
    report: str | None = option(
        None,
        help="folder of decisions.parquet and index.html (default: beside the output, NAME_report)",
        metavar="DIR",
    )
    train_samples: int | None = option(
        None,
        help="pairs that the training will read (steps x packs of a step x pairs of a pack): the report then says how "
        "often each kept pair is read, and warns above about 4 times",
        metavar="N",
    )
    memory_limit: str = option("4GB", help="of the process; more goes to the output's disk", metavar="SIZE")
    threads: int | None = option(None, help="default: one per core", metavar="N")
    seed: int = option(42, help="which of equal scores at a top() threshold stay", metavar="N")
    deduplicate: Literal["exact", "near", "semantic"] | None = option(
        None,
        help="of chosen pairs with equal image files, similar pictures (both need scores of image-hash), or like "
        "embeddings (score --keep-embeddings), keep the smallest uid",
    )
    near_distance: int = option(3, help="most bits of the hash's 64 in which similar pictures differ", metavar="N")

    min_similarity: float = option(
        0.95, help="cosine from which embeddings are semantic duplicates; with --joint the mean of two", metavar="X"
    )
    joint: bool = option(False, help="semantic duplicates are alike in image and text, not in the image alone")
    like: tuple[str, ...] = option(
        (),
        help="scores, with embeddings, of a reference set: of what is left --sample are drawn whose task types, "
        "clusters of pictures and questions, have its proportions",
        metavar="SCORES",
        form="repeated",
    )
    sample: int | None = option(None, help="how many are drawn for --like", metavar="N")
    task_types: int = option(50, help="clusters of --like, at most a quarter of the reference", metavar="N")

    def __post_init__(self):
        if bool(self.like) != (self.sample is not None):
            raise ValueError("--like and --sample go together")
        for name in ("sample", "task_types"):
            if (getattr(self, name) or 1) < 1 or getattr(self, name) == 0:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        if (self.keep is None) == (self.sql is None):
            raise ValueError("give --keep EXPR or --sql SELECT" + (", not both" if self.sql is not None else ""))
        if not 0 < self.min_similarity <= 1:
            raise ValueError(f"--min-similarity must be above 0 and at most 1, got {self.min_similarity}")
        if self.joint and self.deduplicate != "semantic":
            raise ValueError("--joint is for --deduplicate semantic")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {self.threads}")
        if self.train_samples is not None and self.train_samples < 1:
            raise ValueError(f"--train-samples must be at least 1, got {self.train_samples}")
        if self.deduplicate not in (None, "exact", "near", "semantic"):
            raise ValueError(f"--deduplicate {self.deduplicate}: there are exact, near and semantic")
        if not 0 <= self.near_distance <= MAX_DISTANCE:
            raise ValueError(f"--near-distance must be from 0 to {MAX_DISTANCE} of 64 bits, got {self.near_distance}")
        if place(self.output).suffix != ".npy":
            raise ValueError(f"--output {self.output}: a file of uids is called .npy")
        for path in self.scores:
            # A rerun would take the report's parquet for scores.
            if place(path).resolve() in (self.report_folder.resolve(), *self.report_folder.resolve().parents):
                raise ValueError(
                    f"{self.report_folder}: the report would lie among the scores in {path}; choose another --report"
                )

    @property
    def report_folder(self) -> Place:
        """Where the report goes."""
        output = place(self.output)
        return output.with_name(f"{output.stem}_report") if self.report is None else place(self.report)
