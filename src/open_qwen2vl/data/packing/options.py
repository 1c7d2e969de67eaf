"""Options of the step `pack`."""

from dataclasses import dataclass
from typing import Literal

from ...options import option

VIDEO = "videos"


@dataclass(frozen=True)
class PackOptions:
    """What is packed, and how: the options of `open-qwen2vl pack`."""

    shards: tuple[str, ...] = option(
        help="WebDataset tars of captions, of images or videos, or of interleaved documents (a json with texts and "
        "images in order); .json or .jsonl of conversations (LLaVA's form or messages), documents (OBELICS, MMC4), "
        "image or video and caption, or texts; .csv of image and caption, or of texts; .parquet or a data set from "
        "save_to_disk with any of them; folders of tars, of parquet or of .jsonl files; or "
        "URLs of them (s3://, gs://, hf://datasets/ORG/NAME[@REVISION][/PATH])",
        positional=True,
        metavar="FILES",
    )
    output: str = option(help="folder of the plan; a rerun finishes what is missing in it", metavar="DIR")
    processor: str | None = option(
        None, help="hub id or folder of the model or of its processor, of any model family", metavar="ID_OR_DIR"
    )
    tokenizer: str | None = option(
        None,
        help="instead, for Open-Qwen2VL: hub id or folder of a tokenizer, as Qwen/Qwen2.5-1.5B",
        metavar="ID_OR_DIR",
    )
    images: tuple[str, ...] = option(
        (),
        help="where images are that are named by a path: a folder, an uncompressed .tar or a .zip; may be repeated "
        "(default for tables: their own folder)",
        metavar="DIR_OR_ARCHIVE",
        form="repeated",
    )
    image_seq_length: int | None = option(
        None, help="tokens per image of Open-Qwen2VL (default: 144, or the processor's)", metavar="N"
    )
    min_pixels: int | None = option(
        None, help="pixels to which a smaller image is enlarged, for Qwen2-VL (default: the processor's)", metavar="N"
    )
    max_pixels: int | None = option(
        None, help="pixels to which a larger image is reduced, for Qwen2-VL (default: the processor's)", metavar="N"
    )
    fixed_resolution: int | None = option(
        None, help="side in pixels of the square that every image becomes, for ablations of Qwen2-VL", metavar="N"
    )
    video_fps: float | None = option(
        None, help="frames that are shown of a second of video, for Qwen2-VL (default: 2)", metavar="N", group=VIDEO
    )
    max_frames: int | None = option(
        None, help="most frames of a video, an even number (default: 768)", metavar="N", group=VIDEO
    )
    max_video_tokens: int | None = option(
        None,
        help="positions that a video takes at most: its frames are made smaller (default: 16384; with packs of fewer "
        "positions set it below, or long videos are left out as too_long)",
        metavar="N",
        group=VIDEO,
    )
    skip_broken_videos: bool = option(
        False, help="leave out a video that breaks off, instead of showing what is there", group=VIDEO
    )
    text_after_video: Literal["space", "time"] | None = option(
        None,
        help="what positions behind a video count on from: its rows and columns, as transformers 5 has it (space, the "
        "default), or its frames too, as the article (time)",
        group=VIDEO,
    )
    tokens_per_second: float | None = option(
        None, help="of the config of a Qwen2.5-VL (default: 2, as released)", metavar="N", group=VIDEO
    )
    animations: bool = option(
        False, help="gif, webp and png files of captions are videos, not images of one frame", group=VIDEO
    )
    share_images: bool = option(
        False,
        help="conversations on the same picture (path, bytes, or image_id) become one document that holds it once; "
        "they do not see each other",
    )
    subset: str | None = option(
        None, help="uids of the samples or records that are packed, as filter writes them", metavar="FILE.npy"
    )
    max_length: int = option(4096, help="positions of a pack", metavar="N")
    shards_per_group: int = option(8, help="tars whose samples may share packs", metavar="N")
    records_per_group: int = option(
        10_000, help="records of a file, or rows of a table, that may share packs", metavar="N"
    )
    max_images: int | None = option(None, help="most images of a pack (default: any number)", metavar="N")
    caption_column: str | None = option(
        None, help="of records with an image and a text each (default: caption, or text)", metavar="NAME"
    )
    text_only: bool = option(False, help="captions without an image, as a .txt alone in a tar, are documents of text")
    rules: Literal["standard", "original"] = option(
        "standard",
        help="interleaved documents of ten images and more, or longer than a pack, are split before images "
        "(standard), or dropped as by the original code",
    )
    chat_template: str | None = option(
        None, help="one of the processor's chat templates, as chatml (default: default)", metavar="NAME"
    )
    tool_form: Literal["tool_call", "function"] = option(
        "tool_call",
        help="how conversations write calls of tools: <tool_call> as Qwen does today (tool_call), or *FUNCTION*, "
        "*ARGS*, *RESULT* as in Qwen2-VL's article (function)",
    )
    num_workers: int | None = option(
        None, help="processes (default: one per core, at most one per group)", metavar="N"
    )
    engine: Literal["local", "ray"] = option(
        "local", help="ray: workers on a Ray cluster whose machines share the files"
    )
    indexes: str | None = option(
        None,
        help="folder for indexes of tars of captions that have none beside them (reshard's have): the first plan "
        "reads such a tar from its beginning to its end, later ones read its index alone (default: OUTPUT_indexes)",
        metavar="DIR",
    )
