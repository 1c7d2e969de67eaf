"""Training on packs under transformers' Trainer."""

from .arguments import PackedTrainingArguments, parse_arguments
from .checkpoints import newest_complete_checkpoint, save_final_model
from .packed_trainer import PackedTrainer
from .plots import plot_loss

__all__ = [
    "PackedTrainer",
    "PackedTrainingArguments",
    "newest_complete_checkpoint",
    "parse_arguments",
    "plot_loss",
    "save_final_model",
]
