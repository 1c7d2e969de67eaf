"""How often an epoch reads each source of a mixture, and what that means in tokens.

weight of packs, tokens or samples ──► weight of packs ──► packs of an epoch ──► one line a source, before the run
"""

from typing import Any

from .mixture import Source

# A unit that weights may count, and the name of its sum in a plan's totals.
_TOTALS = {"packs": "packs", "tokens": "tokens", "samples": "documents"}


def picks_per_epoch(sources: list[Source], sizes: list[int], plans: list[dict[str, Any]]) -> list[int]:
    """How many packs of each source an epoch reads, at least 1; sources have all weights, or none."""
    if sources[0].weight is None:
        return [max(1, round(source.epochs * size)) for source, size in zip(sources, sizes, strict=True)]
    weights = [source.weight / _per_pack(source, plan) for source, plan in zip(sources, plans, strict=True)]
    # The source that is largest for its weight is read once, the others as often as their weights ask.
    packs_per_weight = max(size / weight for weight, size in zip(weights, sizes, strict=True))
    return [max(1, round(weight * packs_per_weight)) for weight in weights]


def describe_sources(sources: list[Source], plans: list[dict[str, Any]]) -> list[str]:
    """Lines to print before a run: what an epoch reads of each source, and a warning where packs differ in length."""
    picks = picks_per_epoch(sources, [plan["totals"]["packs"] for plan in plans], plans)
    amounts = {
        unit: [
            plan["totals"][total] * number / plan["totals"]["packs"] for plan, number in zip(plans, picks, strict=True)
        ]
        for unit, total in _TOTALS.items()
    }
    lines = []
    for i, (source, plan, number) in enumerate(zip(sources, plans, picks, strict=True)):
        weight = "" if source.weight is None else f", weight {source.weight:g} of {source.weight_by}"
        shares = ", ".join(f"{amounts[u][i]:,.0f} {u} ({_share(amounts[u], i)})" for u in ("tokens", "samples"))
        lines.append(
            f"{source.name}: {number:,} packs an epoch ({_share(amounts['packs'], i)}{weight}), {shares}, each pack "
            f"read {number / plan['totals']['packs']:.3g} times"
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


def _share(amounts: list[float], i: int) -> str:
    return f"{amounts[i] / sum(amounts):.1%}" if sum(amounts) else "0%"
