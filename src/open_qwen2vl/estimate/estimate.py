"""What a run will need, before it starts: memory, speed, hours and cost of a recipe on a kind of GPU.

    inputs.py ─► options, config ─► parameters, memory of a step (memory.py) ─┐
              └► tokens, images ─► time of a step by a roofline (time.py) ────┼► the best layout (placement.py)
                                   └► hours ─► cost (figures.py)              └► what options would gain (levers.py)

What is assumed is printed: the rates that a GPU reaches, or an MFU that is given, and the price.
"""

import difflib
import functools
import math
import re
from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..families import packed_model
from ..families.interface import StepWork, VisionWork
from ..trainer.figures.flops import GPUS, Gpu
from .figures import ASSUMED_AS, Estimate
from .inputs import Work, assumed_work, number_of, planned_work, read_config, read_recipe, read_training
from .levers import predict_levers
from .memory import GIB, PARTS, MicroBatch, Training, parameters_by_part
from .options import EstimateOptions
from .placement import ROOM, best_placement, layout_memory
from .time import Roofline

# Dollars per GPU-hour on demand, by the vendors' public lists on this day. No list has all kinds.
PRICES = {
    "h100": (3.95, "Modal"),
    "h100-pcie": (2.86, "Lambda"),
    "a100-80gb": (2.50, "Modal"),
    "a100-40gb": (1.48, "Lambda"),
    "l40s": (1.95, "Modal"),
}
PRICES_OF = "2026-05-07"
FLOPS_OF_A_BYTE = 300  # of a kind that is not known; 200 to 420 of those of a data centre that are
NO_BF16 = ("v100-32gb", "v100-16gb")  # their peak is that of fp16
_VENDORS = re.compile(r"nvidia|amd|geforce|instinct|tesla|rtx|[^a-z0-9]")


def estimate_recipe(options: EstimateOptions) -> Estimate:
    """Estimate a recipe.

    Args:
        options ([`EstimateOptions`]): what is estimated, and on what.

    Returns:
        [`Estimate`].

    Raises:
        ValueError: for a recipe, a config or a plan that is none, or a kind of GPU that is not known.
    """
    find_gpu(options)
    recipe = read_recipe(options.recipe)
    config = read_config(recipe)
    packed_model(config)  # known, or an error before anything is read
    if options.pairs is None:
        work = planned_work(recipe.get("train_packs"), number_of(recipe, "num_train_epochs"))
    else:
        per_image = options.tokens_per_image or getattr(config, "image_seq_length", None)
        if per_image is None:
            raise ValueError(f"--pairs with {config.model_type} needs --tokens-per-image: its images differ in size")
        work = assumed_work(options.pairs, options.tokens_per_pair, options.images_per_pair, per_image)
    return estimate_run(recipe, config, work, options)


def find_gpu(options: EstimateOptions) -> tuple[str, Gpu]:
    """The kind that `--gpu` means, by any way to write it, with the figures that are given for it."""
    names = {_VENDORS.sub("", name): name for name in GPUS}
    given = options.gpu or f"GPU of {options.tflops:g} TFLOP/s"
    asked = _VENDORS.sub("", given.lower())
    name = names.get(asked, given)
    if name in GPUS:
        gpu = GPUS[name]
    elif options.tflops and options.memory:
        gpu = Gpu("", 0, 0)
    else:
        near = [names[each] for each in difflib.get_close_matches(asked, names, n=4, cutoff=0.5)]
        near = [known for plain, known in names.items() if asked and plain.startswith(asked)] or near
        advice = f"near it are {', '.join(near)}" if near else f"known are {', '.join(GPUS)}"
        raise ValueError(f"--gpu {options.gpu} is not known; {advice}; or give both --tflops and --memory")
    peak = gpu.peak_flops if options.tflops is None else options.tflops * 1e12
    return name, gpu._replace(
        peak_flops=peak,
        memory=gpu.memory if options.memory is None else options.memory,
        bandwidth=options.bandwidth * 1e12 if options.bandwidth else gpu.bandwidth or peak / FLOPS_OF_A_BYTE,
        network=gpu.network if options.network is None else options.network * 1e9,
    )


def estimate_run(
    recipe: dict[str, Any], config: PreTrainedConfig, work: list[Work], options: EstimateOptions
) -> Estimate:
    """Put it all together, for an epoch's work of a recipe's options and config."""
    name, gpu = find_gpu(options)
    num_gpus, training = options.num_gpus, read_training(recipe)
    in_bf16 = _in_bf16(name, recipe, training, options.mfu)
    batch_size = int(number_of(recipe, "per_device_train_batch_size"))
    packs_per_step = num_gpus * batch_size * training.accumulation
    steps, epochs = _steps(recipe, work, packs_per_step)
    trained = {part: int(part in training.trained) for part in PARTS}
    flops = epochs * sum(packed_model(config).step_flops(config, _step_work(config, each), trained) for each in work)
    tokens, images = (epochs * sum(getattr(each, field) for each in work) for field in ("tokens", "images"))
    roofline = _roofline(config, work, gpu, options)
    micro_batch, capacity = functools.partial(_micro_batch, config, work), gpu.memory * GIB

    def memory(layout: str, training: Training = training, packs: int = batch_size) -> dict[str, float]:
        return layout_memory(roofline, training, micro_batch(packs), layout)

    layout = _layout(roofline, {name: sum(memory(name).values()) <= capacity for name in roofline.layouts})
    time = roofline.step(layout, training, batch_size)
    peak_seconds = flops / (num_gpus * gpu.peak_flops)
    seconds = steps * time.step if options.mfu is None else peak_seconds / options.mfu
    price, source = _price(name, options.price_per_hour)
    return Estimate(
        gpu=name,
        num_gpus=num_gpus,
        mfu=peak_seconds / seconds,
        assumed_mfu=options.mfu is not None,
        products=_products(recipe, training),
        assumed_products=_products_assumed(recipe),
        parameters=roofline.counts,
        trained=sorted(training.trained),
        gpu_memory=capacity,
        memory={name: memory(name) for name in roofline.layouts},
        layout=layout,
        packs_per_micro_batch=batch_size,
        time=time if in_bf16 else None,
        levers=[]
        if not in_bf16
        else predict_levers(
            roofline,
            layout,
            training,
            batch_size,
            peak_seconds / steps,
            lambda training, packs: sum(memory(layout, training, packs).values()) <= ROOM * capacity,
        ),
        placement=best_placement(roofline, training, micro_batch, packs_per_step // num_gpus, capacity),
        packs_per_step=packs_per_step,
        steps=steps,
        tokens=tokens,
        images=images,
        flops=flops,
        tokens_per_second=tokens / seconds,
        images_per_second=images / seconds,
        hours=seconds / 3600,
        price_per_hour=price,
        price_source=source,
    )


def _in_bf16(gpu: str, recipe: dict[str, Any], training: Training, mfu: float | None) -> bool:
    """Whether products are in bf16, whose peaks are known; a `ValueError` where time must be predicted without."""
    if gpu in NO_BF16:
        reason = f"--gpu {gpu} has no bf16 units"
    elif not training.bf16 and training.dtype != torch.bfloat16:
        reason = f"bf16 is off: this recipe computes in {_products(recipe, training)}"
        if _products_assumed(recipe):
            reason = f"the recipe does not say bf16: {_products(recipe, training)} is assumed, {ASSUMED_AS}"
    else:
        return True
    if mfu is None:
        raise ValueError(f"{reason}, and time is predicted for bf16 alone; give --mfu, the share of its peak reached")
    return False


def _products(recipe: dict[str, Any], training: Training) -> str:
    """The type that products are computed in."""
    return "bf16" if training.bf16 else "fp16" if recipe.get("fp16") else str(training.dtype).removeprefix("torch.")


def _products_assumed(recipe: dict[str, Any]) -> bool:
    """Whether that is the recipe's own default: the same file means bf16 to recipes/sft.py."""
    return recipe["bf16"] is None and not recipe.get("fp16")


def _roofline(config: PreTrainedConfig, work: list[Work], gpu: Gpu, options: EstimateOptions) -> Roofline:
    """Of a mean pack of the work."""
    packs = sum(each.packs for each in work)
    done = [_step_work(config, each) for each in work]
    tokens, squared, media = (sum(each[i] for each in done) / packs for i in range(3))
    vision = VisionWork(*(sum(figures) / packs for figures in zip(*(each.vision for each in done), strict=True)))
    return Roofline(
        config=config,
        counts=parameters_by_part(config),
        gpu=gpu,
        num_gpus=options.num_gpus,
        gpus_per_machine=options.gpus_per_machine,
        pack=StepWork(tokens, squared, media, vision),
        labels=sum(each.labels for each in work) / packs,
        loader_rate=options.loader_rate,
    )


def _layout(roofline: Roofline, fits: dict[str, bool]) -> str:
    """The one that a recipe runs in with its own micro-batch: the simplest that fits."""
    return next((name for name in roofline.layouts if fits[name]), roofline.layouts[-1])


def _price(gpu: str, given: float | None) -> tuple[float | None, str]:
    if given is not None or gpu not in PRICES:
        return given, "--price-per-hour"
    price, vendor = PRICES[gpu]
    return price, f"{vendor}'s list of {PRICES_OF}; --price-per-hour"


def _steps(options: dict[str, Any], work: list[Work], packs_per_step: int) -> tuple[int, float]:
    """Optimizer steps and epochs; sources of one phase fill up whole steps together."""
    phases: Counter[int] = Counter()
    for each in work:
        phases[each.phase] += each.packs
    steps_per_epoch = sum(math.ceil(packs / packs_per_step) for packs in phases.values())
    epochs, max_steps = number_of(options, "num_train_epochs"), int(number_of(options, "max_steps"))
    if max_steps > 0:
        return max_steps, max_steps / steps_per_epoch
    return math.ceil(epochs * steps_per_epoch), epochs


def _step_work(config: PreTrainedConfig, work: Work) -> StepWork:
    vision = packed_model(config).vision_work(config, work.images, work.media_tokens)
    return StepWork(work.tokens, work.squared_lengths, work.images, vision)


def _micro_batch(config: PreTrainedConfig, work: list[Work], batch_size: int) -> MicroBatch:
    """So many full packs, those with the most images and those with the most labels."""
    images = round(batch_size * max(each.most_images for each in work))
    per_image = max(each.media_tokens / each.images if each.images else 0 for each in work)
    return MicroBatch(
        positions=batch_size * max(each.max_length for each in work),
        images=images,
        labels=round(batch_size * max(each.labels / each.packs for each in work)),
        vision=packed_model(config).vision_work(config, images, images * per_image),
    )
