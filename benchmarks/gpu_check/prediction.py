"""What `open-qwen2vl estimate` says of a case, to be held beside what was measured."""

import functools
import re
from typing import Any, NamedTuple

import torch

from open_qwen2vl.estimate.estimate import estimate_run
from open_qwen2vl.estimate.inputs import DEFAULTS, planned_work
from open_qwen2vl.estimate.memory import GIB
from open_qwen2vl.estimate.options import EstimateOptions
from open_qwen2vl.trainer.figures.flops import GPUS

from .models import Bench, make_config

ASSUMED = "h100"  # where there is no card


class Prediction(NamedTuple):
    """Of a step of a case."""

    gib: float  # at the fullest moment, with the reserve
    milliseconds: float | None  # a pack
    mfu: float | None


@functools.cache
def kind_of_card() -> str:
    """The name that `estimate --gpu` has for this card, or the one that is assumed."""
    if not torch.cuda.is_available():
        return ASSUMED
    name = torch.cuda.get_device_name()
    return next((kind for kind, gpu in GPUS.items() if re.search(gpu.device_name, name)), ASSUMED)


def predict(bench: Bench, options: dict[str, Any]) -> Prediction:
    """What a run of these options takes on this kind of card."""
    recipe = {**DEFAULTS, "dtype": "float32", "bf16": True, "max_steps": 1, **options}
    work = planned_work(str(bench.small_packs()))
    estimate = estimate_run(recipe, make_config(bench.size), work, EstimateOptions(recipe="", gpu=kind_of_card()))
    seconds = estimate.time.step / estimate.packs_per_step
    # The plan is read again and again here; what it lacks of a step is not filled up with empty packs.
    packs = sum(each.packs for each in work) * estimate.tokens / sum(each.tokens for each in work)
    return Prediction(
        sum(estimate.memory["one_gpu"].values()) / GIB, 1e3 * seconds, estimate.mfu * estimate.packs_per_step / packs
    )
