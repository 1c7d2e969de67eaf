"""`open-qwen2vl decontaminate`: evaluation pictures and texts in a pool."""

from ..decontamination.options import DecontaminateOptions as OPTIONS

SUMMARY = "find evaluation pictures and texts in a pool, as scores for filter (a rerun makes what is missing)"
BUCKETS = True


def run(options: OPTIONS) -> None:
    """Look for them, and print the report."""
    from ..decontamination import decontaminate

    print(decontaminate(options))
