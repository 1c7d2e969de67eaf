"""`open-qwen2vl boxes`: conversations about boxes from COCO, RefCOCO or Visual Genome."""

from ..grounding.options import BoxesOptions as OPTIONS

SUMMARY = "make conversations about boxes of COCO's, RefCOCO's or Visual Genome's annotations"


def run(options: OPTIONS) -> None:
    """Write them, and print the report."""
    from ..grounding.conversations import write_conversations

    print(write_conversations(options))
