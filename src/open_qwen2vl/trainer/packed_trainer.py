"""transformers' Trainer on packs of documents."""

from transformers import PreTrainedModel, Trainer

from .arguments import PackedTrainingArguments
from .packed_training import PackedTraining


class PackedTrainer(PackedTraining, Trainer):
    """[`PackedTraining`] on transformers' `Trainer`: pre-training, on packs alone.

    Args:
        model (`PreTrainedModel` or `PeftModel`): of a known family (`open_qwen2vl.families`), which prepares it for
            packs. Its parameters are frozen or not as `args` says.
        args ([`PackedTrainingArguments`]): the arguments.
        data_collator (`Callable`, *optional*): a [`PackingCollator`] by default, which pads all packs to the plan's
            length where `torch_compile` is set.
        callbacks (`list[TrainerCallback]`, *optional*): besides the trainer's own.
        kwargs: all else that `transformers.Trainer` takes. A `train_dataset` that is a [`PackMixture`] is read in
            [`PackOrder`], any other in the stock trainer's.

    Raises:
        ValueError: for a model of no known family, under FSDP version 1, where FSDP was asked for and accelerate did
            not start it, or for `eval_tasks` that cannot run.
    """

    def __init__(
        self, model: PreTrainedModel, args: PackedTrainingArguments, data_collator=None, callbacks=None, **kwargs
    ):
        super().__init__(model, args, data_collator, callbacks, **kwargs)
