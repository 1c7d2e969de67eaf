"""`open-qwen2vl reshard`: the samples of a subset in training tars."""

from ..data.resharding.options import ReshardOptions as OPTIONS

SUMMARY = "copy the samples of a subset into new tars (member bytes untouched, an index beside each tar)"
BUCKETS = True


def run(options: OPTIONS) -> None:
    """Reshard, and print the report."""
    from ..data.resharding.resharding import reshard

    print(reshard(options))
