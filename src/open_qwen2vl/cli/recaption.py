"""`open-qwen2vl recaption`: captions that a model writes, beside those of a pool."""

from ..data.recaptioning.options import RecaptionOptions as OPTIONS

SUMMARY = "let a model write captions for a pool, one parquet file for each tar (a rerun makes what is missing)"
BUCKETS = True


def run(options: OPTIONS) -> None:
    """Caption, and print the report."""
    from ..data.recaptioning import recaption_pool

    print(recaption_pool(options))
