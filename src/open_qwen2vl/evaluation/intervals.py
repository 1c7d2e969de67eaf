"""How far a score may be off: 95 % intervals, each by the method that fits what is known of its samples.

The interval says how much a score would move with other questions of the same kind, nothing about the training's seed.
"""

import math
from typing import NamedTuple

import numpy as np

Z = 1.959964  # two-sided 95 % of a normal distribution
RESAMPLES = 4000
SEED = 0
# How near a score must be to the mean of its samples to count as that mean: a rounded one still does.
TOLERANCE = 1e-4


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float  # lower end, in the score's own unit
    high: float
    method: str  # `"Wilson"`, `"bootstrap"` or `"normal"`


def confidence_interval(value: float, scores: np.ndarray, stderr: float | None = None) -> Interval | None:
    """The 95 % interval of a score, a share or in percent, by what its samples scored (0 to 1, NaN where unknown).

    Where the score is the samples' mean: Wilson's if they scored 0 or 1, else a percentile bootstrap. Normal from the
    harness's standard error for other metrics, and `None` where that is unknown too.
    """
    scale = _scale(value, scores)
    if scale is not None and np.isin(scores, (0.0, 1.0)).all():
        low, high = wilson(float(scores.mean()), len(scores))
        return Interval(scale * low, scale * high, "Wilson")
    if scale is not None:
        low, high = bootstrap(scores)
        return Interval(scale * low, scale * high, "bootstrap")
    if stderr:
        return Interval(value - Z * stderr, value + Z * stderr, "normal")
    return None


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    center = share + Z**2 / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    low, high = ((center + side * half) / (1 + Z**2 / count) for side in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def bootstrap(scores: np.ndarray) -> tuple[float, float]:
    """Percentile interval of the mean over resampled samples, always the same for the same scores."""
    values, counts = np.unique(scores, return_counts=True)
    # How often each value is drawn, which is the same as drawing samples one by one and takes no time.
    drawn = np.random.default_rng(SEED).multinomial(len(scores), counts / len(scores), size=RESAMPLES)
    low, high = np.percentile(drawn @ values / len(scores), (2.5, 97.5))
    return float(low), float(high)


def _scale(value: float, scores: np.ndarray) -> float | None:
    """100 or 1 where the score is the samples' mean in percent or as a share, `None` where it is another metric."""
    if len(scores) == 0 or np.isnan(scores).any():
        return None
    for scale in (100.0, 1.0):
        if abs(scale * float(scores.mean()) - value) <= scale * TOLERANCE:
            return scale
    return None
