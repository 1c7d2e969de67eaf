"""Options of the step `score`."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from ...options import flag, option

SCORERS = {  # by name, the options that each takes; the first of those in `_NEEDED` cannot be left out
    "clip": ("model", "pretrained", "batch_size", "device", "keep_embeddings"),
    "mlm-filter": ("model", "metric", "prompts", "decode", "batch_size", "device"),
    "metadata": ("columns",),
    "basic": (),
    "image-hash": (),
    "concepts": ("concepts",),
}
WITH_MODEL = ("clip", "mlm-filter")
_NEEDED = (*WITH_MODEL, "metadata")
_OF_SCORERS = (
    "model",
    "pretrained",
    "prompts",
    "device",
    "metric",
    "decode",
    "columns",
    "concepts",
    "batch_size",
    "keep_embeddings",
)
_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
_ONE, _WORK = "of one scorer", "how it is run"


@dataclass(frozen=True)
class ScoreOptions:
    """What is scored, and how: the options of `open-qwen2vl score`.

    Raises:
        ValueError: for an option out of its range, or one that the scorer does not take.
    """

    pool: tuple[str, ...] = option(
        help="WebDataset tars of captions, or folders of them; conversations as pack takes them (.json, .jsonl, "
        ".parquet); with --scorer metadata: parquet files of DataComp's form, or folders of them",
        positional=True,
        metavar="POOL",
    )
    output: str = option(help="the scores go to DIR/NAME/TAR.parquet", metavar="DIR")
    scorer: Literal["clip", "mlm-filter", "metadata", "basic", "image-hash", "concepts"] = option(
        help="clip: cosine similarity by a model of open_clip; mlm-filter: what an image-text-to-text model answers; "
        "metadata: columns of the pool's tables; basic: words, characters, smaller_side, aspect_ratio and english; "
        "image-hash: what the filter finds duplicates by; concepts: things that the caption names, for balance()"
    )
    images: tuple[str, ...] = option(
        (),
        help="of conversations, where images are that are named by a path: a folder, an uncompressed .tar or a .zip; "
        "may be repeated (default for tables: their own folder)",
        metavar="DIR_OR_ARCHIVE",
        form="repeated",
    )
    name: str | None = option(None, help="what the filter calls the scores (default: the scorer)", metavar="NAME")
    model: str | None = option(
        None,
        help="clip: a name of open_clip, hf-hub:ORG/NAME or local-dir:DIR; mlm-filter: hub id or folder",
        metavar="M",
        group=_ONE,
    )
    pretrained: str | None = option(
        None, help="clip: weights of a model that is given by its name", metavar="TAG_OR_FILE", group=_ONE
    )
    prompts: str | None = option(
        None, help="mlm-filter: the wording that a model was trained with", metavar="FILE.yaml", group=_ONE
    )
    device: str | None = option(
        None,
        help="clip, mlm-filter: as cpu or cuda:1 (default: the GPU, if there is one)",
        metavar="DEVICE",
        group=_ONE,
    )
    metric: tuple[str, ...] | None = option(
        None,
        help="mlm-filter: image_text_matching, object_detail_fulfillment, caption_text_quality, "
        "semantic_understanding or all; of conversations answer_correctness, answer_helpfulness, visual_dependence, "
        "instruction_complexity or all; may be repeated (default: all)",
        metavar="NAME",
        form="repeated",
        group=_ONE,
    )
    decode: Literal["expectation", "greedy"] | None = option(
        None, help="mlm-filter: how a score is read (default: expectation)", group=_ONE
    )
    columns: tuple[str, ...] | None = option(
        None, help="metadata: columns of the tables", metavar="A,B", form="commas", group=_ONE
    )
    concepts: str | None = option(
        None,
        help="concepts: a name a line (default: 3,500 things of WordNet, ImageNet and COCO, in English)",
        metavar="FILE",
        group=_ONE,
    )
    batch_size: int | None = option(None, help="clip, mlm-filter: pairs scored together", metavar="N", group=_ONE)
    keep_embeddings: bool = option(
        False,
        help="clip: keep those of images and texts, 16 bits a number, in DIR/NAME/embeddings, for the filter's "
        "--deduplicate semantic",
        group=_ONE,
    )
    num_workers: int | None = option(
        None,
        help="clip, mlm-filter: threads that decode for a model; others: processes (default: one per core)",
        metavar="N",
        group=_WORK,
    )
    engine: Literal["local", "ray"] = option("local", help="where", group=_WORK)
    gpus_per_worker: float | None = option(
        None, help="of each Ray actor with a model (default: 1; --device cpu: 0)", metavar="X", group=_WORK
    )

    def __post_init__(self):
        if self.scorer not in SCORERS:
            raise ValueError(f"--scorer {self.scorer}: known are {', '.join(SCORERS)}")
        given, taken = self.of_scorer(), SCORERS[self.scorer]
        strangers = [flag(name) for name in given if name not in taken]
        if strangers:
            raise ValueError(f"--scorer {self.scorer} takes no {', '.join(strangers)}")
        for name in taken[:1]:
            if self.scorer in _NEEDED and not given.get(name):
                raise ValueError(f"--scorer {self.scorer} needs {flag(name)}")
        for name in ("batch_size", "num_workers"):
            if (getattr(self, name) or 1) < 1 or getattr(self, name) == 0:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        if self.gpus_per_worker is not None and (self.engine != "ray" or self.scorer not in WITH_MODEL):
            raise ValueError(f"--gpus-per-worker is for --engine ray with {' or '.join(WITH_MODEL)}")
        check_name(self.scores_name)

    @property
    def scores_name(self) -> str:
        """What the filter calls the scores."""
        return self.name or self.scorer

    def of_scorer(self) -> dict[str, Any]:
        """The options of one scorer that are given."""
        return {name: getattr(self, name) for name in _OF_SCORERS if getattr(self, name) not in (None, False)}


def check_name(name: str) -> None:
    """Raise for a name of scores that the filter could not read."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"--name {name}: a name has letters, digits, '_', '-' and '.', and no digit first")
