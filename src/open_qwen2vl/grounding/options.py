"""Options of the step `boxes`."""

from dataclasses import dataclass
from typing import Literal

from ..options import option


@dataclass(frozen=True)
class BoxesOptions:
    """From annotations to conversations: the options of `open-qwen2vl boxes`.

    Raises:
        ValueError: for an option out of its range.
    """

    source: str = option(
        help="COCO's instances json, Visual Genome's region_descriptions.json (image_data.json beside it), or "
        "RefCOCO's table of jxu124/refcoco on the Hub (parquet), or refs as json (instances.json beside them)",
        positional=True,
        metavar="SOURCE",
    )
    images: tuple[str, ...] = option(help="folders of the images", metavar="DIR")
    task: Literal["referring", "detection", "description"] = option(
        help="referring: a phrase is asked, its box answered; description: the other way round; detection: all "
        "objects of an image (COCO)"
    )
    output: str = option(help="file of conversations, which pack reads", metavar="FILE.jsonl")
    split: str = option("train", help="of RefCOCO; the others stay out, for they are evaluated on", metavar="NAME")
    max_turns: int = option(8, help="questions of a conversation, which is about one image", metavar="N")

    def __post_init__(self):
        if self.max_turns < 1:
            raise ValueError(f"--max-turns must be at least 1, got {self.max_turns}")
        if not self.output.endswith(".jsonl"):
            raise ValueError(f"--output {self.output}: conversations are written as json lines, to a .jsonl file")
