"""How often an epoch, or a run, reads each source of a mixture, and what that means in tokens.

weight of packs, tokens or samples ──► weight of packs ──► packs of an epoch ──► one line a source, before the run
schedules and limits               ──► shares at each place of the run, lowered to the limits ──► turns of the run
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .sources import Source, weight_at

# A unit that weights may count, and the name of its sum in a plan's totals.
_TOTALS = {"packs": "packs", "tokens": "tokens", "samples": "documents"}


_INTERVALS = 2_000  # of a run, within which shares are taken to be linear
_ROUNDS = 1_000  # of lowering weights to limits, which converges by a factor each
_LOWEST = 1e-9  # factor of a weight that is lowered in vain


def picks_per_epoch(
    sources: list[Source], sizes: list[int], plans: list[dict[str, Any]], epochs: float = 1.0
) -> list[int]:
    """How many packs of each source an epoch reads, at least 1; sources have all weights, or none.

    Of a schedule the mean weight counts; a limit on epochs is shared out over the run's `epochs`.
    """
    if sources[0].weight is None:
        return [max(1, round(source.epochs * size)) for source, size in zip(sources, sizes, strict=True)]
    weights = [_mean_weight(source) / _per_pack(source, plan) for source, plan in zip(sources, plans, strict=True)]
    # The source that is largest for its weight is read once, the others as often as their weights ask.
    packs_per_weight = max(size / weight for weight, size in zip(weights, sizes, strict=True))
    picks = [max(1, round(weight * packs_per_weight)) for weight in weights]
    limits = [pick if s.max_epochs is None else s.max_epochs * size / max(epochs, 1e-9)
              for s, size, pick in zip(sources, sizes, picks, strict=True)]  # fmt: skip
    return [min(pick, max(1, int(limit))) for pick, limit in zip(picks, limits, strict=True)]


def _mean_weight(source: Source) -> float:
    if not isinstance(source.weight, tuple):
        return source.weight
    grid = _grid([source])
    return float(np.trapezoid(weight_at(source.weight, grid), grid))


def _grid(sources: Sequence[Source]) -> np.ndarray:
    points = [share for source in sources if isinstance(source.weight, tuple) for share, _ in source.weight]
    return np.unique(np.concatenate([np.linspace(0, 1, _INTERVALS + 1), points]))


def turns_of_run(sources: list[Source], sizes: list[int], plans: list[dict[str, Any]], packs: int) -> np.ndarray:
    """The source of each pack that a run reads: as the weights are at that place, and none beyond its limit.

    A source whose weight would take it beyond is given less of it all along, so that the limit is reached at the end
    and the mixture does not change on the way.

    Args:
        sources (`list[Source]`): with weights.
        sizes (`list[int]`): packs of each.
        plans (`list[dict]`): the plan of each.
        packs (`int`): that the run reads.

    Returns:
        `np.ndarray`: int32 `(packs,)`, numbers of sources.

    Raises:
        ValueError: if the limits of all sources together, or of those that have a weight at a time, are too low.
    """
    limits = np.array(
        [np.inf if s.max_epochs is None else s.max_epochs * n for s, n in zip(sources, sizes, strict=True)]
    )
    grid = _grid(sources)
    # (sources, places): packs of each read before each place of the run.
    read = packs * _shares_read(sources, plans, grid, limits / packs)
    whole = np.floor(limits + 1e-6)
    counts = np.minimum(np.floor(read[:, -1] + 1e-6), whole).astype(np.int64)
    # What rounding down leaves goes to those that it took the most from.
    for source in np.argsort(counts - read[:, -1], kind="stable"):
        counts[source] += min(max(0, packs - counts.sum()), max(0, whole[source] - counts[source]), 1)
    if counts.sum() < packs:
        raise ValueError(_too_little(packs, limits))
    times = [
        np.interp((np.arange(count) + 0.5) / count, reached / max(reached[-1], 1e-300), grid)
        for count, reached in zip(counts, read, strict=True)
    ]
    turns = np.repeat(np.arange(len(sources), dtype=np.int32), counts)
    return turns[np.argsort(np.concatenate(times), kind="stable")]


def _shares_read(sources: list[Source], plans: list[dict], grid: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """The part of a run that is packs of each source read before each place; limits are parts of the run too."""
    weights = [weight_at(s.weight, grid) / _per_pack(s, plan) for s, plan in zip(sources, plans, strict=True)]
    weights = np.array([np.broadcast_to(weight, grid.shape) for weight in weights])
    factors = np.ones(len(sources))
    for _ in range(_ROUNDS):
        shares = weights * factors[:, None] / (factors @ weights)
        middles = (shares[:, 1:] + shares[:, :-1]) / 2
        read = np.concatenate([np.zeros((len(sources), 1)), np.cumsum(middles * np.diff(grid), axis=1)], axis=1)
        beyond = read[:, -1] / limits
        # At a time at which only limited sources have a weight, lowering it does not help.
        if (beyond <= 1 + 1e-9).all() or factors.min() < _LOWEST:
            break
        factors /= np.maximum(beyond, 1)
    return read


def _too_little(packs: int, limits: np.ndarray) -> str:
    allowed = "" if np.isinf(limits).any() else f", in all {int(np.floor(limits).sum()):,}"
    return (
        f"the run reads {packs:,} packs, more than max_epochs allows{allowed}: raise a limit, or leave it out of the "
        "source that may be read again"
    )


def loss_weights(sources: list[Source], plans: list[dict[str, Any]]) -> list[float] | None:
    """What a label of each source counts, with a mean of 1 over the labels of an epoch; None where all are alike."""
    if len({source.loss_weight for source in sources}) == 1:
        return None
    totals = [plan["totals"] for plan in plans]
    picks = picks_per_epoch(sources, [total["packs"] for total in totals], plans)
    labels = [total["labels"] * pick / total["packs"] for total, pick in zip(totals, picks, strict=True)]
    weighted = sum(source.loss_weight * count for source, count in zip(sources, labels, strict=True))
    return [source.loss_weight * sum(labels) / weighted if weighted else 1.0 for source in sources]


def describe_sources(
    sources: list[Source], plans: list[dict[str, Any]], counts: Sequence[int] | None = None
) -> list[str]:
    """Lines to print before a run: what it reads of each source, and a warning where packs differ in length.

    `counts` are the packs that the run reads of each where schedules or limits say so; otherwise the lines tell of an
    epoch.
    """
    picks = picks_per_epoch(sources, [plan["totals"]["packs"] for plan in plans], plans) if counts is None else counts
    span, loss = "an epoch" if counts is None else "in the run", loss_weights(sources, plans)
    amounts = {
        unit: [
            plan["totals"][total] * number / plan["totals"]["packs"] for plan, number in zip(plans, picks, strict=True)
        ]
        for unit, total in _TOTALS.items()
    }
    lines = []
    for i, (source, plan, number) in enumerate(zip(sources, plans, picks, strict=True)):
        weight = "" if source.weight is None else f", weight {_shown(source.weight)} of {source.weight_by}"
        limit = "" if source.max_epochs is None else f" (at most {source.max_epochs:g})"
        counted = "" if loss is None else f", a label counts {loss[i]:.3g}"
        shares = ", ".join(f"{amounts[u][i]:,.0f} {u} ({_share(amounts[u], i)})" for u in ("tokens", "samples"))
        lines.append(
            f"{source.name}: {number:,} packs {span} ({_share(amounts['packs'], i)}{weight}), {shares}, each pack "
            f"read {number / plan['totals']['packs']:.3g} times{limit}{counted}"
        )
    lengths = {plan["max_length"] for plan in plans}
    if len(lengths) > 1 and sources[0].weight is not None and sources[0].weight_by == "packs":
        listed = " and ".join(map(str, sorted(lengths)))
        lines.append(
            f"warning: packs are of {listed} positions, and weights count packs: weight_by: tokens counts tokens"
        )
    return lines


def _per_pack(source: Source, plan: dict[str, Any]) -> float:
    if source.weight_by == "packs":
        return 1.0
    return plan["totals"][_TOTALS[source.weight_by]] / plan["totals"]["packs"]


def _shown(weight: Any) -> str:
    if not isinstance(weight, tuple):
        return f"{weight:g}"
    return "{" + ", ".join(f"{share:g}: {value:g}" for share, value in weight) + "}"


def _share(amounts: list[float], i: int) -> str:
    return f"{amounts[i] / sum(amounts):.1%}" if sum(amounts) else "0%"
