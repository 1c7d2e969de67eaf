"""Options of the step `recaption`."""

from dataclasses import dataclass
from typing import Any, Literal

from ...options import flag, option
from ..scoring.options import check_name

OF_MODEL = ("batch_size", "device", "num_workers", "gpus_per_worker")  # that an endpoint does not take
MEANT = ("model", "endpoint", "prompt", "max_new_tokens", "min_words", "max_words")  # what decides the captions
_WORK, _CHECKS = "how it is run", "what a caption must be"


@dataclass(frozen=True)
class RecaptionOptions:
    """What is captioned, and how: the options of `open-qwen2vl recaption`.

    Raises:
        ValueError: for an option out of its range, or one that does not go with another.
    """

    pool: tuple[str, ...] = option(
        help="WebDataset tars of images, with or without captions, or folders of tars", positional=True, metavar="POOL"
    )
    output: str = option(help="the captions go to DIR/NAME/TAR.parquet, a score file for filter", metavar="DIR")
    model: str = option(
        help="hub id or folder of an image-text-to-text model; with --endpoint the name that it is served under",
        metavar="M",
    )
    endpoint: str | None = option(
        None,
        help="ask a server of OpenAI's form (vLLM, transformers serve, ...), as http://host:8000/v1; the key is read "
        "from OPENAI_API_KEY",
        metavar="URL",
    )
    prompt: str = option(
        "Describe what this picture shows, in one paragraph.",
        help="what the model is asked about each picture; {caption} stands for the caption that it has",
        metavar="TEXT",
    )
    name: str = option("recaption", help="what filter and reshard call the captions", metavar="NAME")
    max_new_tokens: int = option(256, help="most tokens of a caption", metavar="N")
    min_words: int = option(3, help="fewer are too_short", metavar="N", group=_CHECKS)
    max_words: int = option(250, help="more are too_long", metavar="N", group=_CHECKS)
    batch_size: int | None = option(None, help="pictures captioned together (default: 16)", metavar="N", group=_WORK)
    device: str | None = option(
        None, help="as cpu or cuda:1 (default: the GPU, if there is one)", metavar="DEVICE", group=_WORK
    )
    num_workers: int | None = option(
        None, help="threads that decode pictures for the model (default: one per core)", metavar="N", group=_WORK
    )
    concurrency: int | None = option(
        None, help="requests that an endpoint gets at a time (default: 16)", metavar="N", group=_WORK
    )
    engine: Literal["local", "ray"] = option("local", help="where", group=_WORK)
    gpus_per_worker: float | None = option(
        None, help="of each Ray actor (default: 1; --device cpu: 0)", metavar="X", group=_WORK
    )

    def __post_init__(self):
        check_name(self.name)
        if not self.prompt.strip():
            raise ValueError("--prompt: is empty")
        for name in ("max_new_tokens", "min_words", "max_words", "batch_size", "num_workers", "concurrency"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        if self.max_words < self.min_words:
            raise ValueError(f"--max-words {self.max_words} is below --min-words {self.min_words}")
        if self.endpoint is None and self.concurrency is not None:
            raise ValueError("--concurrency is for --endpoint")
        strangers = [flag(name) for name in OF_MODEL if getattr(self, name) is not None]
        if self.endpoint is not None and (strangers or self.engine != "local"):
            what = ", ".join(strangers or ["--engine ray"])
            raise ValueError(f"--endpoint takes no {what}: one process asks, with --concurrency")
        if self.gpus_per_worker is not None and self.engine != "ray":
            raise ValueError("--gpus-per-worker is for --engine ray")

    def of_captions(self) -> dict[str, Any]:
        """The options that decide what is written."""
        return {name: getattr(self, name) for name in MEANT}
