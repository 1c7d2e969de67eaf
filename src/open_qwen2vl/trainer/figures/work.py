"""The work of a micro-batch, from what the collator counted."""

from typing import Any

from ...families.interface import StepWork, VisionWork


def step_work(stats: dict[str, Any]) -> StepWork:
    """Of `packing_stats`."""
    vision = VisionWork(stats["patches"], stats["vision_squared"], stats["vision_tokens"])
    return StepWork(stats["tokens"], stats["squared_lengths"], stats["media"], vision)
