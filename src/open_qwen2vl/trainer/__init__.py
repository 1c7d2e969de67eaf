"""Training on packs under transformers' Trainer."""

from .arguments import PackedTrainingArguments
from .checkpoints.folders import newest_complete_checkpoint, save_final_model
from .command_line import parse_arguments
from .figures.plots import plot_loss
from .packed_trainer import PackedTrainer
from .run import run_recipe

__all__ = [
    "PackedTrainer",
    "PackedTrainingArguments",
    "newest_complete_checkpoint",
    "parse_arguments",
    "plot_loss",
    "run_recipe",
    "save_final_model",
]
