"""TRL's SFTTrainer on packs of conversations, or on conversations one by one.

TRL's arguments, PEFT handling and checks stay. Two things of it do not: its loss, which scores every position through
a patched head where there is no Triton, and its data path, which knows neither packs nor resuming them.
"""

from typing import Any

import datasets
import torch
from peft import PeftConfig, PeftModel
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin, set_seed
from trl import SFTTrainer

from ..data.packing.unpacked_dataset import UnpackedConversations
from .lora import add_lora, check_targets
from .optimization import base_model
from .packed_training import PackedTraining
from .sft_arguments import PackedSFTConfig


class _OwnDataAndForward(SFTTrainer):
    """SFTTrainer that takes any map-style data set and leaves the model as it is."""

    def __init__(self, model: PreTrainedModel | PeftModel, train_dataset: Dataset, **kwargs):
        base = base_model(model)
        forward = vars(base).get("forward")
        trained = [] if base is model else [p for p in model.parameters() if p.requires_grad]
        unrounded = [parameter.data for parameter in trained]
        # TRL wants a data set of its own kind and looks at its first row: here, that there are images and turns.
        super().__init__(model=model, train_dataset=datasets.Dataset.from_list([_EXAMPLE]), **kwargs)
        self.train_dataset = train_dataset
        # Its patched forward would go on living in the user's model.
        vars(base).pop("forward", None)
        if forward is not None:
            base.forward = forward
        for parameter, data in zip(trained, unrounded, strict=True):
            # On a quantised model TRL rounds all that trains to bf16, where small updates vanish.
            parameter.data = data.to(parameter.device)


class PackedSFTTrainer(PackedTraining, _OwnDataAndForward):
    """[`PackedTraining`] on TRL's `SFTTrainer`.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): hub id, folder or model.
        args ([`PackedSFTConfig`], *optional*): the arguments; those of TRL's defaults where not given.
        train_dataset (`Dataset`): a [`PackMixture`] or other map-style data set of packs; or a `datasets.Dataset` with
            `messages` and `images`, which is trained on unpacked, with the same labels and loss.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*): the same for evaluation.
        processing_class (`ProcessorMixin`, *optional*): the model's where not given.
        peft_config (`peft.PeftConfig`, *optional*): an adapter to train, see [`lora_config`]. It decides alone what
            trains; `train_projector` and `train_language_model` are not looked at. What trains is kept in fp32.
        data_collator (`Callable`, *optional*): a [`PackingCollator`] by default.
        callbacks (`list[TrainerCallback]`, *optional*): besides the trainer's own.
        kwargs: all else that `trl.SFTTrainer` takes.

    Raises:
        ValueError: as [`PackedTraining`], [`add_lora`] and [`UnpackedConversations`], or for an adapter beside a
            vision tower that is to be trained, or on a base in 16 bits without mixed precision.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: PackedSFTConfig | None = None,
        train_dataset: Dataset | datasets.Dataset | None = None,
        eval_dataset: Dataset | datasets.Dataset | dict[str, Dataset] | None = None,
        processing_class: ProcessorMixin | None = None,
        peft_config: PeftConfig | None = None,
        data_collator=None,
        callbacks: list | None = None,
        **kwargs,
    ):
        name = model if isinstance(model, str) else model.config._name_or_path
        args = PackedSFTConfig(f"{name.split('/')[-1]}-SFT") if args is None else args
        if isinstance(model, str):
            options = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code}
            model = AutoModelForImageTextToText.from_pretrained(model, **{**options, **(args.model_init_kwargs or {})})
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        self._processor = processing_class
        self._max_length = args.max_length
        super().__init__(
            _with_adapter(model, args, peft_config),
            args,
            data_collator,
            callbacks,
            train_dataset=self._readable(train_dataset),
            eval_dataset=self._readable(eval_dataset),
            processing_class=self._processor,
            **kwargs,
        )

    def _readable(self, dataset: Any) -> Any:
        if isinstance(dataset, dict):
            return {name: self._readable(part) for name, part in dataset.items()}
        if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
            return UnpackedConversations(dataset, self._processor, self._max_length)
        return dataset


_EXAMPLE = {
    "images": [],
    "messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}],
}


def _with_adapter(
    model: PreTrainedModel | PeftModel, args: PackedSFTConfig, peft_config: PeftConfig | None
) -> PreTrainedModel | PeftModel:
    """The model with its adapter in place; all of it that trains is in fp32."""
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ValueError("the model has an adapter already: merge it first, or leave peft_config out")
        # New weights are random. TRL, which would put the adapter on too late for us, seeds as well.
        set_seed(args.seed)
        model = add_lora(model, peft_config)
    if not isinstance(model, PeftModel):
        return model
    check_targets(model)
    if args.train_vision_tower:
        raise ValueError("train_vision_tower does not go with an adapter: peft_config decides what trains")
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if dtypes != {torch.float32} and not (args.bf16 or args.fp16):
        raise ValueError("a base in 16 bits needs bf16 (or fp16): its adapter is in fp32, and autocast joins the two")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model
