"""What a training run achieves: FLOPs of a step, tokens and images per second, TFLOP/s, MFU, dropped documents.

Figures are those of a logging window, the steps since the last log; evaluation and checkpoints are not in it. Ranks
count on their own and add up once per log, so that no step waits for a figure. Totals travel in the checkpoint.
"""

import time
from collections import Counter
from typing import Any

import torch
from accelerate.utils import gather_object, reduce
from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

# Dense bf16 FLOP/s by a part of torch's device name, the more special name first (NVIDIA's data sheets).
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}

WORK = ("tokens", "documents", "images", "flops")


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device.

    Args:
        device_name (`str`): as `torch.cuda.get_device_name` gives it.

    Returns:
        `float`: FLOP/s, or None where it is not known: CPUs, other GPUs, slices of a GPU.
    """
    if "MIG" in device_name:
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


def language_model_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a Qwen2 model with embeddings and head counted once (1,543,714,304 for Qwen2.5-1.5B).

    Args:
        config (`PreTrainedConfig`): the text config.

    Returns:
        `int`: their number.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    queries, keys_values = heads * head_dim, 2 * config.num_key_value_heads * head_dim
    attention = (hidden + 1) * (queries + keys_values) + queries * hidden
    block = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    return config.num_hidden_layers * block + hidden + config.vocab_size * hidden


def vision_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the vision blocks that run (26 of the 27 of SigLIP-SO400M).

    Args:
        config (`OpenQwen2VLConfig`): the whole model's config.

    Returns:
        `int`: their number; embeddings and final norm are not blocks.
    """
    width, inner = config.vision_config.hidden_size, config.vision_config.intermediate_size
    block = 4 * (width + 1) * width + (width + 1) * inner + (inner + 1) * width + 4 * width
    return config.num_vision_blocks * block


def step_flops(
    config: PreTrainedConfig,
    tokens: int,
    squared_lengths: int,
    images: int,
    image_seq_length: int,
    train_projector: bool = True,
    train_language_model: bool = True,
    train_vision_tower: bool = False,
) -> int:
    """FLOPs that a forward and backward over packed documents need.

    A forward is 2 FLOPs per parameter and position, gradients of the activations 2 more, gradients of the weights
    2 more; what nothing before it needs is left out. The head is counted at every real position, as is usual, though
    only labelled ones are computed. Attention is causal within documents, and full within images.

    Args:
        config (`OpenQwen2VLConfig`): the model's config.
        tokens (`int`): real positions; padding is no work to be proud of.
        squared_lengths (`int`): sum over documents of their length squared.
        images (`int`): number of images.
        image_seq_length (`int`): tokens per image.
        train_projector (`bool`, *optional*, defaults to `True`): whether it is trained.
        train_language_model (`bool`, *optional*, defaults to `True`): whether it is trained.
        train_vision_tower (`bool`, *optional*, defaults to `False`): whether it is trained.

    Returns:
        `int`: floating-point operations, a multiply-add being two.
    """
    text, vision = config.text_config, config.vision_config
    # 6 N per position where it is trained; 4 N where gradients only pass through to the image features.
    language = (6 if train_language_model else 4) * language_model_parameters(text) * tokens
    language += 6 * text.num_hidden_layers * text.hidden_size * squared_lengths

    projector_parameters = (vision.hidden_size + 1 + text.hidden_size + 1) * text.hidden_size
    projector_passes = 3 if train_projector else 2 if train_vision_tower else 1
    projector = 2 * projector_passes * projector_parameters * images * image_seq_length

    patches = config.patches_per_side**2
    vision_forward = 2 * vision_parameters(config) * patches
    vision_forward += 4 * config.num_vision_blocks * vision.hidden_size * patches**2
    return language + projector + (3 if train_vision_tower else 1) * vision_forward * images


def rates(work: dict[str, float], seconds: float, device: torch.device, world_size: int) -> dict[str, float]:
    """Work done to speed.

    Args:
        work (`dict`): `tokens`, `images` and `flops` of all ranks.
        seconds (`float`): the time that they took.
        device (`torch.device`): the training device.
        world_size (`int`): number of ranks.

    Returns:
        `dict`: `tokens_per_second` and `images_per_second` of all ranks together, `tflops_per_second` of one device,
        and `mfu` (0 to 1) where the device's [`peak_flops`] is known.
    """
    seconds = max(seconds, 1e-9)
    flops_per_device = work["flops"] / seconds / world_size
    figures = {
        "tokens_per_second": work["tokens"] / seconds,
        "images_per_second": work["images"] / seconds,
        "tflops_per_second": flops_per_device / 1e12,
    }
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return figures if peak is None else {**figures, "mfu": flops_per_device / peak}


def sum_over_ranks(values: list[float], device: torch.device, world_size: int) -> list[float]:
    """Add up figures of all ranks; every rank must call it.

    Args:
        values (`list[float]`): this rank's figures; whole numbers stay exact up to 2**53.
        device (`torch.device`): the training device.
        world_size (`int`): number of ranks.

    Returns:
        `list[float]`: their sums.
    """
    if world_size == 1:
        return values
    # Not int64: the FLOPs of a long window on many ranks do not fit.
    return reduce(torch.tensor(values, dtype=torch.float64, device=device), "sum").tolist()


class ThroughputCallback(TrainerCallback, ExportableState):
    """Counts the work of a run; [`PackedTrainer`] feeds it and puts its figures into every training log.

    Attributes:
        totals (`dict`): `tokens`, `documents`, `images`, `flops` of all ranks and `seconds` since the first step of
            the first run, up to the last log.
        dropped (`dict`): documents that could not be read, by reason; one that is met in every epoch counts each time.
    """

    def __init__(self):
        self.totals = dict.fromkeys((*WORK, "seconds"), 0)
        self.dropped: dict[str, int] = {}
        self._window: Counter[str] = Counter()
        self._window_dropped: Counter[str] = Counter()
        self._window_start = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What the checkpoint's `trainer_state.json` holds of this callback."""
        return {"args": {}, "attributes": {"totals": dict(self.totals), "dropped": dict(self.dropped)}}

    def count(self, stats: dict[str, Any], flops: int) -> None:
        """Add a micro-batch of this rank.

        Args:
            stats (`dict`): the collator's `packing_stats`.
            flops (`int`): its [`step_flops`].
        """
        self._window.update({name: stats[name] for name in ("tokens", "documents", "images")}, flops=flops)
        self._window_dropped.update(stats["dropped"])

    def close_window(self, device: torch.device, world_size: int) -> dict[str, float]:
        """End the window at this moment and open the next; every rank must call it.

        Args:
            device (`torch.device`): the training device, which is waited for.
            world_size (`int`): number of ranks.

        Returns:
            `dict`: `tokens_per_second` and `images_per_second` of all ranks, `tflops_per_second` and `mfu` (where
            [`peak_flops`] is known) per device, and since the start `train_seconds` and `dropped_documents`.
        """
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds = time.perf_counter() - self._window_start
        counts = [*(self._window[name] for name in WORK), self._window_dropped.total()]
        *sums, dropped = sum_over_ranks(counts, device, world_size)
        work = {name: int(value) for name, value in zip(WORK, sums, strict=True)}
        if dropped:
            # The reasons are words, so they are gathered only when there is something to tell.
            for reasons in gather_object([dict(self._window_dropped)]):
                self.dropped = dict(Counter(self.dropped) + Counter(reasons))
        for name, value in {**work, "seconds": seconds}.items():
            self.totals[name] += value
        self._open_window()
        return {
            **rates(work, seconds, device, world_size),
            "train_seconds": self.totals["seconds"],
            "dropped_documents": sum(self.dropped.values()),
        }

    def _open_window(self) -> None:
        self._window.clear()
        self._window_dropped.clear()
        self._window_start = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Take up the totals of the checkpoint that training continues from."""
        name = type(self).__name__
        saved = type(self)().state() if state.global_step == 0 else state.stateful_callbacks[name]
        self.totals, self.dropped = saved["attributes"]["totals"], saved["attributes"]["dropped"]
        self._open_window()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """End the window before a checkpoint, an evaluation and the end of training, whatever `logging_steps`.

        So the window never holds anything but training, and the losses that a resumed run logs are averages over the
        same steps as those of a run that was never stopped.
        """
        if control.should_save or control.should_evaluate or control.should_training_stop:
            control.should_log = True

    on_epoch_end = on_step_end

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Leave the evaluation's time out of the window."""
        self._window_start = time.perf_counter()

    on_save = on_evaluate
