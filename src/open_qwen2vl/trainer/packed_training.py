"""What the trainers on packs share: a mixin in front of transformers' Trainer or of TRL's SFTTrainer.

Everything of the stock trainers stays: accelerate, FSDP2, schedulers, reporting. Added are the choice of the parts
that train and their learning rates, the order of the packs, the model's own loss at labelled positions, figures of
every step over all ranks, an evaluation loss per token, and checkpoints that a killed run continues from exactly.
"""

import inspect
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from ..data.packing.mixture import PackMixture
from ..data.packing.pack_order import PackOrder
from ..processing.collator import PackingCollator
from .arguments import PackedArguments
from .checkpoints.saving import ExactCheckpoints
from .figures.flops import step_flops
from .figures.loss_watch import LossWatch, stop_training
from .figures.profiling import ProfileCallback
from .figures.progress import ThroughputProgressCallback
from .figures.steps import StepMeter
from .figures.throughput import ThroughputCallback, rates
from .model_card import write_trainer_card
from .optimization import PartwiseOptimization, base_model, choose_trained_parts, trained_parameters
from .packed_evaluation import PackedEvaluation
from .task_evaluation import TaskEvaluation


class PackedTraining(ExactCheckpoints, PartwiseOptimization, PackedEvaluation, TaskEvaluation):
    """Trains on the batches of a [`PackingCollator`]; to be combined with `Trainer` or a subclass of it.

    Args:
        model (`PreTrainedModel` or `PeftModel`): with `model.vision_tower`, `model.multi_modal_projector` and
            `model.language_model`. Its parameters are frozen or not as `args` says.
        args ([`PackedArguments`]): the arguments.
        data_collator (`Callable`, *optional*): a [`PackingCollator`] by default, which pads all packs to the plan's
            length where `torch_compile` is set.
        callbacks (`list[TrainerCallback]`, *optional*): besides those of this class.
        kwargs: all else that the stock trainer takes. A `train_dataset` that is a [`PackMixture`] is read in
            [`PackOrder`], any other in the stock trainer's.

    Raises:
        ValueError: under FSDP version 1, where FSDP was asked for and accelerate did not start it, or for `eval_tasks`
            that cannot run.
    """

    def __init__(self, model: nn.Module, args, data_collator=None, callbacks: list | None = None, **kwargs):
        if args.train_sampling_strategy != "random" and isinstance(kwargs.get("train_dataset"), PackMixture):
            raise ValueError("train_sampling_strategy is not supported: packs come in an order of their own")
        self._prepare_model(model, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or self._collator(args, kwargs.get("train_dataset")),
            callbacks=[ThroughputCallback(), LossWatch(), *(callbacks or [])],
            **kwargs,
        )
        self._check_fsdp()
        self.add_callback(_StepEnd(self))
        if args.profile:
            self.add_callback(ProfileCallback())
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ThroughputProgressCallback)
        self._model_class = type(self.model)
        self._trained = trained_parameters(self.model)
        self._order: PackOrder | None = None
        self._micro_batch_flops = 0
        self._row_losses: torch.Tensor | None = None
        self._grad_norm: torch.Tensor | float = 0.0
        self._meter = StepMeter(args.device, args.world_size, len(self.source_names))

    def _prepare_model(self, model: nn.Module, args) -> None:
        choose_trained_parts(model, args)
        base = base_model(model)
        # A cache would join the documents of a pack. Trainer switches it off in the top config only.
        base.config.text_config.use_cache = False
        self._gives_row_losses = "return_row_losses" in inspect.signature(base.forward).parameters

    @staticmethod
    def _collator(args: PackedArguments, train_dataset: Dataset | None) -> PackingCollator:
        # One shape for all batches, so that a compiler compiles once.
        fixed = args.torch_compile and isinstance(train_dataset, PackMixture)
        return PackingCollator(pad_to_multiple_of=train_dataset.max_length if fixed else None)

    def _check_fsdp(self) -> None:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not self.is_fsdp_enabled:
            raise ValueError(
                "FSDP was asked for, but accelerate starts it on accelerators only and would train with DDP in "
                "silence; choose a config without FSDP for this machine"
            )
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version == 1:
            raise ValueError(
                "FSDP version 1 flattens parameters, so that weight decay finds no matrix; use fsdp_version: 2"
            )
        if plugin.ignored_modules is None and not self.args.train_vision_tower:
            # A frozen tower has no gradients to shard: each rank keeps it whole and gathers nothing for it.
            plugin.ignored_modules = r".*vision_tower"
        if plugin.mixed_precision_policy is not None:
            # accelerate's policy adds up gradients in bf16, over micro-batches and ranks, and rounds the loss to it.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
            )

    @property
    def throughput(self) -> ThroughputCallback:
        """The run's counters (looked up, because Trainer may replace callbacks when it restores their states)."""
        return self._callback(ThroughputCallback)

    def _callback(self, kind: type[TrainerCallback]) -> Any:
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, kind))

    @property
    def source_names(self) -> list[str]:
        """Names of the training data's sources."""
        return self.train_dataset.names if isinstance(self.train_dataset, PackMixture) else ["packs"]

    @property
    def data_fingerprint(self) -> dict[str, Any] | None:
        """What tells the training data from others; None for data without a `fingerprint`."""
        return getattr(self.train_dataset, "fingerprint", None)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, PackMixture):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        self._order = PackOrder(
            dataset,
            args.world_size,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.seed if args.data_seed is None else args.data_seed,
        )
        return self._order

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Take the micro-batches of a step from the loader, and the time that this takes.

        Args:
            epoch_iterator (`Iterator`): of the loader.
            num_batches (`int`): micro-batches of the step.
            device (`torch.device`): the training device.

        Returns:
            `tuple`: the batches, and the number of labels in them on all ranks.
        """
        start = time.perf_counter()
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._meter.wait(time.perf_counter() - start)
        return batches

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run a micro-batch as `Trainer` does, and count it.

        Args:
            model (`nn.Module`): the model, wrapped for training.
            inputs (`dict`): a batch of the collator; `packing_stats` is taken out of it.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): labels in the step, all micro-batches and ranks.

        Returns:
            `torch.Tensor`: the detached loss.
        """
        stats = inputs.pop("packing_stats")
        self._micro_batch_flops = step_flops(
            self.model.config,
            stats["tokens"],
            stats["squared_lengths"],
            stats["images"],
            inputs["image_seq_length"],
            bool(self._trained["projector"]),
            bool(self._trained["language_model"]),
            bool(self._trained["vision_tower"]),
            self._trained["adapter"],
        )
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._meter.micro_batch(stats, self._micro_batch_flops, loss, self._row_losses)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The model's own loss, at the labelled positions only, and not that of a trainer in between.

        Args:
            model (`nn.Module`): the model, wrapped for training.
            inputs (`dict`): a batch of the collator without `packing_stats`.
            return_outputs (`bool`, *optional*, defaults to `False`): return the model's output as well.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): divides the sum of the losses.

        Returns:
            `torch.Tensor`, or a tuple of it and the model's output.
        """
        if self._gives_row_losses:
            inputs = {**inputs, "return_row_losses": True}
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        self._row_losses = outputs.get("row_losses")
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> torch.Tensor | float:
        self._grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._grad_norm

    def _end_step(self) -> None:
        """After each optimizer step, on every rank: account, judge, and leave if asked to."""
        self._meter.end_step(self.state.global_step, self._grad_norm, self.stop_request.requested)
        control = self.control
        self._account(control.should_log or control.should_save or control.should_evaluate or self._at_end)
        if control.should_training_stop:
            self._account(True)

    @property
    def _at_end(self) -> bool:
        return self.state.global_step >= self.state.max_steps

    def _account(self, all_steps: bool) -> None:
        for step in self._meter.finished(all_steps):
            self.throughput.add(step)
            verdict = self._callback(LossWatch).verdict(step, self.args.max_loss_rise)
            if verdict is not None:
                stop_training(step, verdict, getattr(self.train_dataset, "describe", None), self.args.output_dir)
            if step.stop_requested and not self._at_end:
                self.interrupted = self.control.should_save = self.control.should_training_stop = True

    def _run_epoch(self, *args, **kwargs) -> None:
        # Trainer looks only after a step whether it was the last: a finished run, started again, would take one more.
        if self._at_end:
            self.control.should_training_stop = True
            return
        if self._order is not None:
            # Where several ranks resume within an epoch, neither Trainer nor accelerate reaches the sampler.
            self._order.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of the last micro-batch, for `state.total_flos`; Trainer's own estimate knows no images."""
        return self._micro_batch_flops

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete a training log by the figures of its window.

        Args:
            logs (`dict`): the log; every rank calls with the same keys.
            start_time (`float`, *optional*): start of the training.
        """
        if "loss" in logs:
            # Trainer's own loss starts anew after an interruption; the window's does not.
            logs.update(self.throughput.close_window(self.args.device, self.args.world_size, self.source_names))
            logs.update(self.part_rates)
        Trainer.log(self, logs, start_time)

    def create_model_card(self, model_name: str | None = None, license: str | None = None, **kwargs) -> None:
        """Write the card of this run into `output_dir`, whence pushes take it; what is not in it is not passed on."""
        write_trainer_card(self, self.args.output_dir, license=license)

    def summary(self) -> dict[str, Any]:
        """What the whole training did, over all runs that it took.

        Returns:
            `dict`: `steps`, `epochs`, `documents`, `images`, `tokens`, `positions`, `flops`, `train_seconds` (without
            evaluation and checkpoints), the mean [`rates`], `devices`, `final_loss` (the last log's), `sources`
            (packs, tokens, labels and share of all tokens by name), `dropped_documents` by reason and, with
            `eval_tasks`, their latest scores.
        """
        counters = self.throughput
        totals = dict(counters.totals)
        seconds = totals.pop("seconds")
        speed = rates(totals, seconds, self.args.device, self.args.world_size)
        del totals["data_wait"]
        shares = counters.shares(self.source_names)
        return {
            "steps": self.state.global_step,
            "epochs": self.state.epoch,
            **totals,
            "train_seconds": seconds,
            **speed,
            "devices": self.args.world_size,
            "final_loss": next((log["loss"] for log in reversed(self.state.log_history) if "loss" in log), None),
            "sources": {
                name: {**source, "share": shares[name]}
                for name, source in zip(self.source_names, counters.sources, strict=False)
            },
            "dropped_documents": counters.dropped,
            **({"eval_tasks": self.task_scores} if self.args.eval_tasks else {}),
        }


class _StepEnd(TrainerCallback):
    """Tells the trainer that a step is over, and asks for a log of the last one."""

    def __init__(self, trainer: PackedTraining):
        self._trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """After the optimizer step and before Trainer logs, evaluates and saves."""
        if state.global_step >= state.max_steps:
            control.should_log = True
        self._trainer._end_step()
