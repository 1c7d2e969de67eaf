"""What `train_packs` of a recipe may name: one pack set, or several with weights, schedules and limits."""

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

_KEYS = ("path", "name", "weight", "epochs", "weight_by", "phase", "max_epochs", "loss_weight")
UNITS = ("packs", "tokens", "samples")  # that weights count
Schedule = tuple[tuple[float, float], ...]  # shares of the run, ascending, each with the weight there


@dataclass(frozen=True)
class Source:
    """One pack set of a mixture, with either `weight` or `epochs`.

    Attributes:
        name (`str`): shown in logs; unique within the mixture.
        path (`str`): folder of its plan.
        weight (`float` or `Schedule`, *optional*): its share in what is read, relative to the other sources' weights;
            a schedule has the weight at some shares of the run (0 to 1), in between it is linear.
        epochs (`float`, *optional*): how often each of its packs is read in an epoch of the run.
        weight_by (`str`, *optional*, defaults to `"packs"`): what weights count: packs, tokens or samples.
        phase (`int`, *optional*): sources of a lower one are all read before, in each epoch.
        max_epochs (`float`, *optional*): how often each of its packs is read at most in a run; others fill its share.
        loss_weight (`float`, *optional*, defaults to 1): what a label of it counts, relative to the other sources'.
    """

    name: str
    path: str
    weight: float | Schedule | None = None
    epochs: float | None = None
    weight_by: str = "packs"
    phase: int | None = None
    max_epochs: float | None = None
    loss_weight: float = 1.0

    @property
    def follows_run(self) -> bool:
        """Whether what is read of it depends on the place in the run."""
        return isinstance(self.weight, tuple) or self.max_epochs is not None


def parse_sources(value: str | list[dict[str, Any]]) -> list[Source]:
    """Read what names the packs of a run.

    Args:
        value (`str | list[dict]`): a folder, or a list of entries with `path` and, each optional, `name` (the folder's
            by default) and either `weight` (in all entries or in none), perhaps with `weight_by` (the same in all:
            packs, which is the default, tokens or samples) and `max_epochs`, or `epochs` (1 by default); `phase`, a
            whole number (in all entries or in none), by which sources are read one after the other; `loss_weight`.
            A weight is a number, or a schedule `{share of the run: weight, ...}`.

    Returns:
        `list[Source]`: at least one.

    Raises:
        ValueError: for anything else; it names the entry.
    """
    entries = [{"path": value}] if isinstance(value, str) else value
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"packs must be a folder or a list of {{path, name, weight or epochs}}, got {value!r}")
    sources = [_parse_source(number, entry) for number, entry in enumerate(entries, start=1)]
    for key in ("weight", "phase"):
        given = [getattr(source, key) is not None for source in sources]
        if any(given) and not all(given):
            raise ValueError(
                f"source {sources[given.index(False)].name!r} has no {key}: give all of them one, or none"
            )
    if len({source.weight_by for source in sources}) > 1:
        raise ValueError("weight_by must be the same in all sources of a mixture")
    if sources[0].phase is not None and any(source.follows_run for source in sources):
        raise ValueError("sources with a phase have neither max_epochs nor a schedule of weights")
    _check_sums(sources)
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two sources are named {name!r}: give one of them another `name`")
    return sources


def _parse_source(number: int, entry: Any) -> Source:
    where = f"source {number} of the packs"
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise ValueError(f"{where} needs a `path`, got {entry!r}")
    unknown = [key for key in entry if key not in _KEYS]
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    name = entry.get("name", os.path.basename(os.path.abspath(entry["path"])))
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} has the name {name!r}, which must be a word")
    epochs, most, loss_weight = (
        _positive(f"{key} of {where}", entry.get(key)) for key in ("epochs", "max_epochs", "loss_weight")
    )
    weight = _weight(f"weight of {where}", entry.get("weight"))
    if weight is not None and epochs is not None:
        raise ValueError(f"{where} has both a weight and epochs; give one of them")
    if most is not None and weight is None:
        raise ValueError(f"{where} has max_epochs without a weight: epochs says how often it is read")
    weight_by = entry.get("weight_by", UNITS[0])
    if weight_by not in UNITS or ("weight_by" in entry and weight is None):
        raise ValueError(f"weight_by of {where} is {', '.join(UNITS[:-1])} or {UNITS[-1]}, of sources with a weight")
    phase = entry.get("phase")
    if phase is not None and (not isinstance(phase, int) or isinstance(phase, bool)):
        raise ValueError(f"phase of {where} must be a whole number, got {phase!r}")
    epochs = 1.0 if weight is None and epochs is None else epochs
    return Source(name, entry["path"], weight, epochs, weight_by, phase, most, loss_weight or 1.0)


def _weight(what: str, value: Any) -> float | Schedule | None:
    if not isinstance(value, dict):
        return _positive(what, value)
    points = sorted(
        (_number(f"a share of the run in the {what}", share), _number(f"{what} at {share}", weight))
        for share, weight in value.items()
    )
    shares = [share for share, _ in points]
    if not points or shares[-1] > 1:
        raise ValueError(f"{what}: a schedule goes from 0 to 1, the end of the run, got {value!r}")
    if len(set(shares)) < len(shares):
        raise ValueError(f"{what}: a schedule has one weight at each share of the run, got {value!r}")
    if not any(weight for _, weight in points):
        raise ValueError(f"{what} is 0 all the time: leave the source out")
    return tuple(points)


def _check_sums(sources: list[Source]) -> None:
    """Refuse weights of which none is above 0 at some place of the run; between two points they are linear."""
    points = {share for source in sources if isinstance(source.weight, tuple) for share, _ in source.weight}
    for share in sorted(points):
        if not any(weight_at(source.weight, share) for source in sources):
            raise ValueError(f"the weights sum to nothing at {share:g} of the run")


def weight_at(weight: float | Schedule, share: Any) -> Any:
    """The weight at a share of the run, or an array of them."""
    points = weight if isinstance(weight, tuple) else ((0.0, weight),)
    return np.interp(share, *zip(*points, strict=True))


def _positive(what: str, value: Any) -> float | None:
    if value is None:
        return None
    number = _float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{what} must be a positive number, got {value!r}")
    return number


def _number(what: str, value: Any) -> float:
    number = _float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{what} must be a number that is not negative, got {value!r}")
    return number


def _float(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) else float(value)  # YAML takes 1e6 for a word
    except (TypeError, ValueError):
        return math.nan
