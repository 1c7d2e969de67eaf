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
    """Load a model and its processor, without any code of the checkpoint.

    Args:
        name (`str`): hub id or folder, or the `output_dir` of a training.
        device (`str`, *optional*): as `"cuda:1"` or `"cpu"`; the process's own where not given.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`: the model in evaluation mode, in fp32 on a CPU and in the
        checkpoint's own type elsewhere.
    """
    name = model_folder(name)
    target = torch.device(device) if device else PartialState().device
    dtype = torch.float32 if target.type == "cpu" else "auto"
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    return model.to(target).eval(), AutoProcessor.from_pretrained(name, trust_remote_code=False)


def generation_options(kwargs: dict[str, Any], max_new_tokens: int) -> tuple[dict[str, Any], list[str]]:
    """Options of `generate` for a task's generation_kwargs: greedy unless the task asks for a temperature.

    Args:
        kwargs (`dict`): of the task; what is not for `generate` is passed over.
        max_new_tokens (`int`): where the task names none.

    Returns:
        `tuple[dict, list[str]]`: the options, and the strings that end an answer.
    """
    options = {"max_new_tokens": max_new_tokens}
    options |= {name: kwargs[name] for name in PASSED if kwargs.get(name) is not None}
    options["do_sample"] = bool(options.get("temperature"))
    if not options["do_sample"]:
        # None, and not left out: a checkpoint's own sampling defaults would give warnings.
        options |= dict.fromkeys(SAMPLING)
    until = kwargs.get("until") or []
    return options, [text for text in ([until] if isinstance(until, str) else until) if text]


def cut_at(text: str, until: Iterable[str]) -> str:
    """Text before the first of some strings.

    Args:
        text (`str`): an answer.
        until (`Iterable[str]`): strings that end it, not empty.

    Returns:
        `str`: the text without them and what follows.
    """
    ends = [position for end in until if (position := text.find(end)) >= 0]
    return text[: min(ends)] if ends else text


def stop_at(tokenizer: PreTrainedTokenizerBase, until: list[str], prompt_length: int) -> Callable:
    """A stopping criterion of `generate` that looks for strings in each row's answer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): decodes.
        until (`list[str]`): strings that end an answer, at least one.
        prompt_length (`int`): positions before the answers.

    Returns:
        `Callable`: takes ids of shape `(batch, length)`, returns `(batch,)` bool. It reads the last tokens only: no
        token is shorter than a byte.
    """
    window = max(len(text.encode()) for text in until) + 8

    def criterion(input_ids: torch.LongTensor, scores: Any, **kwargs) -> torch.BoolTensor:
        tails = tokenizer.batch_decode(input_ids[:, prompt_length:][:, -window:], skip_special_tokens=True)
        found = [any(end in tail for end in until) for tail in tails]
        return torch.tensor(found, device=input_ids.device)

    return criterion
