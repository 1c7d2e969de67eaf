"""`open-qwen2vl mix`: weights of the sources of a training, by small proxies."""

from ..mixing.options import MixOptions as OPTIONS

SUMMARY = "look for the weights of a mixture: train small proxies, fit their held-out losses (a rerun goes on)"


def run(options: OPTIONS) -> None:
    """Search, and print the report."""
    from ..mixing.search import search_mixture

    print(search_mixture(options))
