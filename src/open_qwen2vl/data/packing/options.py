"""Options of the step `pack`."""

from dataclasses import dataclass
from typing import Literal

from ...options import option


@dataclass(frozen=True)
class PackOptions:
    """What is packed, and how: the options of `open-qwen2vl pack`."""

    shards: tuple[str, ...] = option(
        help="WebDataset tars of captions or of interleaved documents (a json with texts and images in order); .json "
        "or .jsonl of conversations (LLaVA's form or messages) or documents (OBELICS, MMC4); .parquet or a data set "
        "from save_to_disk with messages, with texts and images, or with image and caption; folders of tars, of "
        "parquet or of .jsonl files; or hf://datasets/ORG/NAME[@REVISION][/PATH], which is downloaded to the cache",
        positional=True,
        metavar="FILES",
    )
    output: str = option(help="folder of the plan; a rerun finishes what is missing in it", metavar="DIR")
    tokenizer: str = option(
        help="hub id or folder of the model's tokenizer or processor, as Qwen/Qwen2.5-1.5B", metavar="ID_OR_DIR"
    )
    images: tuple[str, ...] = option(
        (),
        help="where images are that are named by a path: a folder, an uncompressed .tar or a .zip; may be repeated",
        metavar="DIR_OR_ARCHIVE",
        form="repeated",
    )
    image_seq_length: int = option(144, help="tokens per image", metavar="N")
    max_length: int = option(4096, help="positions of a pack", metavar="N")
    shards_per_group: int = option(8, help="tars whose samples may share packs", metavar="N")
    records_per_group: int = option(
        10_000, help="conversations, or rows of a table, that may share packs", metavar="N"
    )
    max_images: int | None = option(None, help="most images of a pack (default: any number)", metavar="N")
    caption_column: str | None = option(
        None, help="of tables with an image in each row (default: caption, or text)", metavar="NAME"
    )
    rules: Literal["standard", "original"] = option(
        "standard",
        help="interleaved documents of ten images and more, or longer than a pack, are split before images "
        "(standard), or dropped as by the original code",
    )
    num_workers: int | None = option(
        None, help="processes (default: one per core, at most one per group)", metavar="N"
    )
