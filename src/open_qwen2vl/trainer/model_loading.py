"""The model that a recipe starts from: of any family, all weights or an adapter; no code that comes with it is run."""

import contextlib
import logging
import pickle
from collections.abc import Iterator
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..model_folders import is_adapter, model_folder

logger = logging.getLogger(__name__)

PACKED = "packed_varlen"
DTYPES = ("float32", "bfloat16", "float16", "auto")


def load_pretrained(
    name: str, dtype: str, attn_implementation: str, revision: str = "main", **options: Any
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model to train on, and its processor.

    Args:
        name (`str`): hub id, folder of a model, or of a training. An adapter is merged into its base model.
        dtype (`str`): of the weights.
        attn_implementation (`str`): of the language model.
        revision (`str`): of a model on the Hub.
        options: passed to `from_pretrained`.

    Raises:
        ValueError: where there is no model, for an adapter on a base that would be quantised, and for an option whose
            package is not installed.
    """
    check_dtype(dtype)
    folder = model_folder(name)
    logger.info("loading the model from %s (%s)", folder, dtype)
    processor = AutoProcessor.from_pretrained(folder, revision=revision, trust_remote_code=False)
    options = {"dtype": dtype, **options}
    if is_adapter(folder):
        if "quantization_config" in options:
            raise ValueError(f"{folder} is an adapter: merge it and save the model before training in 4 bits")
        from .lora import base_of, merged_model  # PEFT takes seconds to import

        logger.info("its adapter is merged into the base model")
        options |= _attention(base_of(folder), attn_implementation)
        with loading_errors_named(folder, attn_implementation):
            return merged_model(folder, **options), processor
    options |= _attention(folder, attn_implementation, revision) | {"revision": revision, "trust_remote_code": False}
    with loading_errors_named(folder, attn_implementation):
        model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"{name} is an adapter: download it and name its folder, or merge it into its base model")
    return model, processor


def _attention(folder: str, wanted: str, revision: str = "main") -> dict[str, str]:
    config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)
    # Other families get the packed attention when they are prepared for packing.
    return {"attn_implementation": wanted} if config.model_type == "open_qwen2vl" or wanted != PACKED else {}


@contextlib.contextmanager
def loading_errors_named(what: str, attn_implementation: str) -> Iterator[None]:
    """A `ValueError` that names what has weights that are none, or the option whose package is not installed."""
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"the weights in {what} cannot be read: {error}") from error
    except ImportError as error:
        if not attn_implementation.startswith("flash"):
            raise ValueError(f"{what} cannot be loaded: {error}") from error
        package = " (pip install flash-attn)" if attn_implementation == "flash_attention_2" else ""
        raise ValueError(f"attn_implementation {attn_implementation}: {error}{package}") from error


def check_dtype(dtype: str) -> None:
    """Raise ValueError for a type of weights that is none."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, none of {', '.join(DTYPES)}")


def tokens_per_image(given: int | None, plans: dict[str, dict[str, Any]]) -> int | None:
    """Tokens per image of the model that packs make, from their plans by path, in the order of training.

    The last plan's: where the number changes, training ends with it. None for families whose images differ in size.
    """
    budgets = {path: plan.get("vision", plan).get("image_seq_length") for path, plan in plans.items()}
    path, last = list(budgets.items())[-1]
    if given in (None, last):
        return last
    if last is None:
        raise ValueError(f"remove image_seq_length: it is Open-Qwen2VL's, and {path} was planned for another family")
    if len(set(budgets.values())) > 1:
        numbers = ", then ".join(str(budget) for budget in dict.fromkeys(budgets.values()))
        raise ValueError(f"remove image_seq_length: the packs have {numbers} tokens an image, one after the other")
    raise ValueError(f"image_seq_length is {given}, but {path} was planned for {last}: remove image_seq_length")
