"""`open-qwen2vl extract-frames`: the frames that training shows of clips, decoded once."""

from ..data.extracting.options import ExtractOptions as OPTIONS

SUMMARY = "decode clips once: their sampled, resized frames in place of them, for pack"


def run(options: OPTIONS) -> None:
    """Extract, and print the report."""
    from ..data.extracting.extracting import extract_frames
    from .pack import load_processor

    print(extract_frames(options, load_processor(options.processor, None)))
