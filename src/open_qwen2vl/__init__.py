"""Open-Qwen2VL in the Hugging Face ecosystem.

Importing this package registers the model with transformers' Auto classes; anything heavier than the model (datasets,
the trainers) is imported when its name is first used.
"""

from importlib import import_module

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .modeling.configuration_open_qwen2vl import OpenQwen2VLConfig
from .modeling.modeling_open_qwen2vl import OpenQwen2VLForConditionalGeneration, OpenQwen2VLModel
from .processing.collator import PackingCollator
from .processing.processing_open_qwen2vl import OpenQwen2VLProcessor

__version__ = "0.1.0"

AutoConfig.register("open_qwen2vl", OpenQwen2VLConfig)
AutoModel.register(OpenQwen2VLConfig, OpenQwen2VLModel)
AutoModelForImageTextToText.register(OpenQwen2VLConfig, OpenQwen2VLForConditionalGeneration)
AutoProcessor.register(OpenQwen2VLConfig, OpenQwen2VLProcessor)

# What `save_pretrained` writes as auto_map, for readers with trust_remote_code=True and without this package.
OpenQwen2VLConfig.register_for_auto_class("AutoConfig")
OpenQwen2VLModel.register_for_auto_class("AutoModel")
OpenQwen2VLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
OpenQwen2VLProcessor.register_for_auto_class("AutoProcessor")


class AutoModelForVision2Seq(AutoModelForImageTextToText):
    """The name that transformers 4 had for `AutoModelForImageTextToText`; transformers 5 removed it."""


_LAZY = {
    "PackedDataset": ".data.packing.packed_dataset",
    "PackedSFTConfig": ".trainer.sft_arguments",
    "PackedSFTTrainer": ".trainer.packed_sft_trainer",
    "PackedTrainer": ".trainer.packed_trainer",
    "PackedTrainingArguments": ".trainer.arguments",
}

__all__ = [
    "AutoModelForVision2Seq",
    "OpenQwen2VLConfig",
    "OpenQwen2VLForConditionalGeneration",
    "OpenQwen2VLModel",
    "OpenQwen2VLProcessor",
    "PackingCollator",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
