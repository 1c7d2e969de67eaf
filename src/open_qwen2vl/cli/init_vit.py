"""`open-qwen2vl init-vit`: the vision tower of a Qwen2-VL from a CLIP or DFN checkpoint."""

from dataclasses import asdict

from ..conversion.options import InitVitOptions as OPTIONS

SUMMARY = "start the vision tower of a Qwen2-VL from an open_clip checkpoint"


def run(options: OPTIONS) -> None:
    """Write the model, and print what was carried over and what was not."""
    from ..conversion.init_vit import init_vit

    print(init_vit(**asdict(options)))
