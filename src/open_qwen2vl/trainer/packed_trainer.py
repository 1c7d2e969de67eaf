"""transformers' Trainer on packs of documents."""

from transformers import PreTrainedModel, Trainer

from .arguments import PackedTrainingArguments
from .packed_training import PackedTraining


class PackedTrainer(PackedTraining, Trainer):
    """[`PackedTraining`] on transformers' `Trainer`: pre-training, on packs alone.

    Args:
        model (`PreTrainedModel`): the model; its parameters are frozen or not as `args` says.
        args ([`PackedTrainingArguments`]): the arguments.
        data_collator (`Callable`, *optional*): a [`PackingCollator`] by default.
        callbacks (`list[TrainerCallback]`, *optional*): besides the trainer's own.
        kwargs: all else that `transformers.Trainer` takes.

    Raises:
        ValueError: under FSDP version 1, or where FSDP was asked for and accelerate did not start it.
    """

    def __init__(
        self, model: PreTrainedModel, args: PackedTrainingArguments, data_collator=None, callbacks=None, **kwargs
    ):
        super().__init__(model, args, data_collator, callbacks, **kwargs)
