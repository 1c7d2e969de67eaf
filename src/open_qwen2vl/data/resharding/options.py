"""Options of the step `reshard`."""

from dataclasses import dataclass
from typing import Literal

from ...options import option


@dataclass(frozen=True)
class ReshardOptions:
    """What is resharded, and how: the options of `open-qwen2vl reshard`.

    Raises:
        ValueError: for an option out of its range.
    """

    pool: tuple[str, ...] = option(
        help="WebDataset tars, or folders of tars; of samples with one uid the first is taken",
        positional=True,
        metavar="POOL",
    )
    subset: str = option(help="uids to keep (dtype u8,u8), as filter writes them", metavar="FILE.npy")
    output: str = option(help="folder of the new tars; a rerun finishes what is missing in it", metavar="DIR")
    samples_per_shard: int = option(10_000, help="samples of a tar", metavar="N")
    shuffle: bool = option(
        False,
        help="shuffle the tars of the pool, then the samples of every 32 of them, so that an output tar is read from "
        "these 32 only (from 64 where it spans two windows); without, the order of the pool is kept",
    )
    captions: tuple[str, ...] = option(
        (),
        help="files of recaption, or folders of them: their captions take the place of the pool's; a sample without "
        "one keeps its own",
        metavar="DIR",
    )
    caption_share: float = option(
        1.0, help="of the samples that get their new caption, drawn by uid and --seed", metavar="X"
    )
    seed: int = option(0, help="of --shuffle and --caption-share", metavar="N")
    num_workers: int | None = option(None, help="processes (default: one per core)", metavar="N")
    engine: Literal["local", "ray"] = option(
        "local", help="ray: workers on a Ray cluster whose machines share the files"
    )

    def __post_init__(self):
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard must be at least 1, got {self.samples_per_shard}")
        if not 0 < self.caption_share <= 1:
            raise ValueError(f"--caption-share must be above 0 and at most 1, got {self.caption_share}")
        if self.caption_share != 1 and not self.captions:
            raise ValueError("--caption-share is for --captions")
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"--num-workers must be at least 1, got {self.num_workers}")
