"""Options of the step `extract-frames`."""

from dataclasses import dataclass

from ...options import option


@dataclass(frozen=True)
class ExtractOptions:
    """Which clips are decoded once, and how: the options of `open-qwen2vl extract-frames`.

    Raises:
        ValueError: for an option out of its range.
    """

    input: tuple[str, ...] = option(
        help="WebDataset tars, folders of tars, or folders of clips at any depth", positional=True, metavar="INPUT"
    )
    output: str = option(
        help="folder of tars of the same names, or of a KEY.frames for each clip; a rerun finishes what is missing",
        metavar="DIR",
    )
    processor: str = option(
        help="hub id or folder of the model or of its processor, which says how large frames are", metavar="ID_OR_DIR"
    )
    video_fps: float | None = option(None, help="frames of a second, as in pack (default: 2)", metavar="N")
    max_frames: int | None = option(None, help="most frames of a clip, as in pack (default: 768)", metavar="N")
    max_video_tokens: int | None = option(
        None, help="positions that a clip takes at most, as in pack (default: 16384)", metavar="N"
    )
    skip_broken_videos: bool = option(False, help="leave out clips that break off")
    animations: bool = option(False, help="gif, webp and png files in tars are clips, too")
    lossless: bool = option(False, help="PNG, so that pixels are the very same; else JPEG, which is far smaller")
    num_workers: int | None = option(None, help="processes (default: one per core)", metavar="N")

    def __post_init__(self):
        for name in ("video_fps", "max_frames", "max_video_tokens", "num_workers"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {value}")
