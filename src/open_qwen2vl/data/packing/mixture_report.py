"""What the weights of a mixture mean: how often each source is read, and its share of packs and of tokens."""

from .mixture import PackMixture
from .pack_order import picks_per_epoch


def mixture_lines(mixture: PackMixture) -> list[str]:
    """A line on an epoch's part of each source."""
    totals = [dataset.plan["totals"] for dataset in mixture.datasets]
    counts = picks_per_epoch(mixture.sources, [total["packs"] for total in totals])
    tokens = [count * total["tokens"] / total["packs"] for count, total in zip(counts, totals, strict=True)]
    return [
        f"source {name}: {total['packs']:,} packs, read {count / total['packs']:.2f} times an epoch: "
        f"{count / sum(counts):.1%} of packs, {part / sum(tokens):.1%} of tokens ({part:,.0f})"
        for name, total, count, part in zip(mixture.names, totals, counts, tokens, strict=True)
    ]


def uneven_lengths(mixture: PackMixture) -> str | None:
    """A warning where packs of several lengths make weights mean something else than shares of tokens."""
    lengths = [dataset.plan["max_length"] for dataset in mixture.datasets]
    if mixture.sources[0].weight is None or len(set(lengths)) == 1:
        return None
    sizes = ", ".join(f"{name} {length:,}" for name, length in zip(mixture.names, lengths, strict=True))
    return f"weights count packs, not tokens, and these hold different numbers of positions: {sizes}"
