"""What `open-qwen2vl estimate` says of a case, to be held beside what was measured."""

import functools
import re
from typing import Any, NamedTuple

import torch

from open_qwen2vl.estimate.estimate import estimate_run
from open_qwen2vl.estimate.inputs import DEFAULTS, planned_work
from open_qwen2vl.estimate.memory import GIB
from open_qwen2vl.estimate.options import EstimateOptions
from open_qwen2vl.estimate.time import BANDWIDTH, PRODUCTS
from open_qwen2vl.trainer.figures.flops import GPUS

from .models import Bench, make_config

ASSUMED, RECIPE_WORKERS = "h100", 8  # where there is no card


class Prediction(NamedTuple):
    """Of a step of a case."""

    gib: float  # at the fullest moment, with the reserve
    milliseconds: float  # a pack
    mfu: float


@functools.cache
def kind_of_card() -> str:
    """The name that `estimate --gpu` has for this card, or the one that is assumed."""
    if not torch.cuda.is_available():
        return ASSUMED
    name = torch.cuda.get_device_name()
    return next((kind for kind, gpu in GPUS.items() if re.search(gpu.device_name, name)), ASSUMED)


def predict(bench: Bench, options: dict[str, Any]) -> Prediction:
    """What a run of these options takes on this kind of card."""
    workers = bench.workers if bench.gpu else RECIPE_WORKERS
    recipe = {"dtype": "float32", "bf16": True, "max_steps": 1, "dataloader_num_workers": workers, **options}
    # So often that steps are whole at any accumulation.
    work = planned_work([{"path": str(bench.small_packs()), "epochs": 128}])
    asked = EstimateOptions(recipe="", gpu=kind_of_card())
    estimate = estimate_run({**DEFAULTS, **recipe}, make_config(bench.size), work, asked)
    seconds = estimate.time.step / estimate.packs_per_step
    return Prediction(sum(estimate.memory["one_gpu"].values()) / GIB, 1e3 * seconds, estimate.mfu)


def assumed_rates() -> dict[str, float]:
    """What predictions go by, for the cases of rates.py: TFLOP/s, and TB/s."""
    gpu = GPUS[kind_of_card()]
    products = PRODUCTS * gpu.peak_flops / 1e12
    fp8 = {"fp8 products": 2 * products} if gpu.float8 else {}
    return {"bf16 products": products, **fp8, "copies": BANDWIDTH * gpu.bandwidth / 1e12}
