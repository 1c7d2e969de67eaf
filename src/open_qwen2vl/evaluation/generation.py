"""Loading a model to evaluate, and the options of `generate` that a task's generation_kwargs mean."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..model_folders import model_folder
from .prompts import image_options

# What of a task's generation_kwargs is for `generate`; others (image_aspect_ratio, ...) are for other models.
SAMPLING = ("temperature", "top_p", "top_k")
PASSED = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "repetition_penalty",
    "length_penalty",
    "eos_token_id",
    *SAMPLING,
)


def load_model(name: str, device: str | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model for evaluation and its processor, without code of the checkpoint; fp32 on a CPU, else its own type."""
    name = model_folder(name)
    try:
        placed = torch.device(device) if device not in (None, "auto") else PartialState().device
        torch.empty(0, device=placed)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    options = {"dtype": torch.float32 if placed.type == "cpu" else "auto"}
    if device == "auto" and placed.type != "cpu":
        options["device_map"] = "auto"
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=False, **options)
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of many kinds, for what a folder may hold
        raise ValueError(f"{name}: cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"{name}: it has no processor, only a {type(processor).__name__}")
    if hasattr(model.config, "image_seq_length"):
        # An adapter may have been trained with another number than its base model's config says.
        model.config.image_seq_length = processor.image_seq_length
    return (model if "device_map" in options else model.to(placed)).eval(), processor


def check_image_seq_length(model: PreTrainedModel, processor: ProcessorMixin, image_seq_length: int | None) -> None:
    """Refuse a number of tokens per image that the processor does not take or the model's grid does not have."""
    if image_options(processor, image_seq_length) and hasattr(model.config, "check_budget"):
        model.config.check_budget(image_seq_length)


def generation_options(kwargs: dict[str, Any], max_new_tokens: int) -> tuple[dict[str, Any], list[str]]:
    """Options of `generate` for a task's generation_kwargs, greedy by default, and the strings that end an answer."""
    options = {"max_new_tokens": max_new_tokens}
    options |= {name: kwargs[name] for name in PASSED if kwargs.get(name) is not None}
    options["do_sample"] = bool(options.get("temperature"))
    if not options["do_sample"]:
        # None, and not left out: a checkpoint's own sampling defaults would give warnings.
        options |= dict.fromkeys(SAMPLING)
    until = kwargs.get("until") or []
    return options, [text for text in ([until] if isinstance(until, str) else until) if text]


def cut_at(text: str, until: Iterable[str]) -> str:
    """Text before the first of some strings."""
    ends = [position for end in until if (position := text.find(end)) >= 0]
    return text[: min(ends)] if ends else text


def stop_at(tokenizer: PreTrainedTokenizerBase, until: list[str], prompt_length: int) -> Callable:
    """A stopping criterion of `generate`: ids `(batch, length)` -> `(batch,)` bool, by each row's last tokens.

    No token is shorter than a byte, so that as many tokens as the longest string has bytes are read.
    """
    window = max(len(text.encode()) for text in until) + 8

    def criterion(input_ids: torch.LongTensor, scores: Any, **kwargs) -> torch.BoolTensor:
        tails = tokenizer.batch_decode(input_ids[:, prompt_length:][:, -window:], skip_special_tokens=True)
        found = [any(end in tail for end in until) for tail in tails]
        return torch.tensor(found, device=input_ids.device)

    return criterion
