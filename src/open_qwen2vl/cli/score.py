"""`open-qwen2vl score`: a file of scores for each tar of a pool."""

from ..data.scoring.options import ScoreOptions as OPTIONS

SUMMARY = "score image-text pairs, one parquet file for each tar (a rerun makes what is missing)"
BUCKETS = True


def run(options: OPTIONS) -> None:
    """Score, and print the report."""
    from ..data.scoring import score_pool

    print(score_pool(options))
