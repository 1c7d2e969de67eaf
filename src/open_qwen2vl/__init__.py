"""Open-Qwen2VL in the Hugging Face ecosystem.

Importing this package makes transformers' Auto classes know the model. Nothing heavy is imported by it, transformers
and torch included, before a name is first used or transformers is imported by somebody else.
"""

from .auto_classes import register_when_imported
from .lazy_names import lazy_names

__version__ = "0.1.0"

_MODULES = {
    "AutoModelForVision2Seq": ".modeling.vision2seq",
    "OpenQwen2VLConfig": ".modeling.configuration_open_qwen2vl",
    "OpenQwen2VLForConditionalGeneration": ".modeling.modeling_open_qwen2vl",
    "OpenQwen2VLModel": ".modeling.modeling_open_qwen2vl",
    "OpenQwen2VLProcessor": ".processing.processing_open_qwen2vl",
    "PackedDataset": ".data.packing.packed_dataset",
    "PackedSFTConfig": ".trainer.sft_arguments",
    "PackedSFTTrainer": ".trainer.packed_sft_trainer",
    "PackedTrainer": ".trainer.packed_trainer",
    "PackedTrainingArguments": ".trainer.arguments",
    "PackingCollator": ".processing.collator",
    "draw_boxes": ".grounding.drawing",
    "parse_boxes": ".grounding.parsing",
    "prepare_for_packing": ".families.qwen_vl.model",
}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)

register_when_imported()
