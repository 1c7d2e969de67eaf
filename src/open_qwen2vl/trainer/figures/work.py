"""The work of a micro-batch, from what the collator counted."""

from typing import Any

from ...families.interface import StepWork, VisionWork


def step_work(stats: dict[str, Any]) -> StepWork:
    """Of `packing_stats`."""
    names = ("patches", "vision_squared", "vision_tokens", "vision_windowed")
    vision = VisionWork(*(stats[name] for name in names))
    return StepWork(stats["tokens"], stats["squared_lengths"], stats["media"], vision)
