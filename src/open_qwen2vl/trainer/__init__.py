"""Training on packs under transformers' Trainer."""

from ..lazy_names import lazy_names

_MODULES = {
    "PackedTrainer": ".packed_trainer",
    "PackedTrainingArguments": ".arguments",
    "newest_complete_checkpoint": ".checkpoints.folders",
    "parse_arguments": ".command_line",
    "plot_loss": ".figures.plots",
    "run_recipe": ".run",
    "save_final_model": ".checkpoints.folders",
}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
