"""What each option that makes a step cheaper would gain, by the roofline."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .memory import Training
from .time import Roofline


@dataclass(frozen=True)
class Lever:
    """Options, and the step with them.

    Attributes:
        options (`str`): as a recipe has them, beside its own; empty for the recipe as it is.
        seconds (`float`): of an optimizer step.
        mfu (`float`): 0 to 1.
    """

    options: str
    seconds: float
    mfu: float


def predict_levers(
    roofline: Roofline,
    layout: str,
    training: Training,
    packs: int,
    peak_seconds: float,
    fits: Callable[[Training, int], bool],
) -> list[Lever]:
    """The recipe as it is, then with options that it lacks and gains by; `peak_seconds` are a step's at the peak."""

    def lever(options: str, changed: Training, at_once: int) -> Lever:
        seconds = roofline.step(layout, changed, at_once).step
        return Lever(options, seconds, peak_seconds / seconds)

    as_it_is = lever("", training, packs)
    found = [lever(options, changed, packs) for options, changed in _fused(roofline, layout, training)]
    if training.accumulation % 2 == 0:
        twice = replace(training, accumulation=training.accumulation // 2)
        if fits(twice, 2 * packs):
            found.append(lever(f"{2 * packs} packs at a time", twice, 2 * packs))
    if roofline.step(layout, training, packs).loading:
        more = replace(training, workers=max(1, 2 * training.workers))
        found.append(lever(f"{more.workers} dataloader_num_workers", more, packs))
    return [as_it_is, *(each for each in found if each.seconds < as_it_is.seconds)]


def _fused(roofline: Roofline, layout: str, training: Training) -> Iterator[tuple[str, Training]]:
    """Of fused operators, which only one library fuses at a time, the one with what goes with it."""
    if not training.fused_by:
        yield "use_liger_kernel", replace(training, fused_by="kernels")
    compiled = replace(training, fused_by="compiled")
    instead = {"": "torch_compile", "kernels": "torch_compile for use_liger_kernel"}
    names = [instead[training.fused_by]] if training.fused_by in instead else []
    if names:
        yield names[0], compiled
    # FSDP2 computes with a residual stream in bf16 anyway.
    if not training.bf16_residual and training.bf16 and layout not in ("hsdp", "fsdp2"):
        names, compiled = [*names, "bf16_residual"], replace(compiled, bf16_residual=True)
        yield ", ".join(names), compiled
    if not training.float8 and roofline.gpu.float8:
        yield ", ".join([*names, "float8"]), replace(compiled, float8=True)
