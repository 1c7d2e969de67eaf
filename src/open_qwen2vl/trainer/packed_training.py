"""What the trainers on packs share: a mixin in front of transformers' Trainer or of TRL's SFTTrainer.

Everything of the stock trainers stays: accelerate, FSDP2, schedulers, reporting. All that is overridden of them stands
here, private methods included, and is short: parts that know no trainer do the work. A test knows the signatures.
"""

import functools
import inspect
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ..data.packing.mixture import PackMixture
from ..data.packing.pack_order import PackOrder
from ..families import packed_model
from . import loading, optimization, sharding
from .accumulation import DeviceCopies, MicroBatches, correct_gradients
from .averaging import WeightAverage
from .checkpoints import background, resuming, saving
from .checkpoints.interruption import StopRequest, only_run_in
from .checkpoints.run_record import run_record, weights_record
from .figures.data_watch import DataWatch
from .figures.loss_watch import LossWatch
from .figures.profiling import ProfileCallback
from .figures.progress import ThroughputProgressCallback
from .figures.steps import StepMeter
from .figures.summary import training_summary
from .figures.throughput import ThroughputCallback
from .figures.verdicts import StepEnd, account
from .figures.work import step_work
from .fused_step import keep_whole_model_uncompiled, liger_off, prepare_fused_step
from .model_card import write_trainer_card
from .muon import muon_and_adamw
from .options import MUON
from .packed_evaluation import Evaluated, loss_sum
from .stall_watch import StallWatch
from .task_evaluation import TaskEvaluation, evaluate_tasks, latest_scores


class PackedTraining:
    """Takes the arguments of [`PackedTrainer`]; `interrupted` tells whether it left early, after a checkpoint."""

    def __init__(self, model: nn.Module, args, data_collator=None, callbacks: list | None = None, **kwargs):
        base = optimization.base_model(model)
        self._family = packed_model(base.config)
        self._family.prepare(base, kwargs.get("processing_class"))
        optimization.choose_trained_parts(model, args, self._family.parts)
        optimization.check_what_trains(model, args)
        prepare_fused_step(base, args, self._family)
        args.dataloader_prefetch_factor = loading.prefetch_factor(args, kwargs.get("train_dataset"))
        self._gives_row_losses = "return_row_losses" in inspect.signature(base.forward).parameters
        loading.check_sources(base, args, data_collator, *map(kwargs.get, ("train_dataset", "eval_dataset")))
        self._parts_of_groups: list[str] = []
        self.part_rates: dict[str, float] = {}
        self.stop_request, self.interrupted = StopRequest(), False
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or loading.pack_collator(args, kwargs.get("train_dataset")),
            callbacks=[ThroughputCallback(), LossWatch(), DataWatch(), *(callbacks or [])],
            **kwargs,
        )
        # Of every family; some of transformers' classes say no, and Trainer would average micro-batches.
        self.model_accepts_loss_kwargs = True
        keep_whole_model_uncompiled(self.accelerator, args)
        sharding.configure(self.accelerator, self.is_fsdp_enabled, self.model, self._family, args)
        loading.keep_video_options(self.processing_class, kwargs.get("train_dataset"))
        self._tasks = TaskEvaluation(args, self.processing_class, self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self._add_own_callbacks()
        self._model_class = type(self.model)
        self._trained = optimization.trained_parameters(self.model, self._family.parts)
        self._weights_record = weights_record(self.model, self._family.parts)
        self._order: PackOrder | None = None
        self._meter = StepMeter(args.device, args.world_size, len(self.source_names))
        self._evaluated, self._staging = Evaluated([]), saving.Staging(args.async_save)
        self._average, self._copies = WeightAverage(args.ema_decay), DeviceCopies(args.device)
        self._row_losses: torch.Tensor | None = None
        self._grad_norm, self._micro_batch_flops, self._step_is_empty, self._labels_are_planned = 0.0, 0, False, False

    def _add_own_callbacks(self) -> None:
        self.add_callback(StepEnd(self._end_step))
        self.add_callback(StallWatch(lambda: self.throughput.is_paused))
        if self.args.profile:
            self.add_callback(ProfileCallback())
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ThroughputProgressCallback)

    def _callback(self, kind: type[TrainerCallback]) -> Any:
        # Each time: Trainer may replace callbacks when it restores their states.
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, kind))

    @property
    def throughput(self) -> ThroughputCallback:
        """The run's counters."""
        return self._callback(ThroughputCallback)

    @property
    def source_names(self) -> list[str]:
        """Names of the training data's sources."""
        return loading.source_names(self.train_dataset)

    @property
    def _at_end(self) -> bool:
        return self.state.global_step >= self.state.max_steps

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, PackMixture):
            return super()._get_train_sampler(train_dataset)
        self._order = loading.train_order(dataset, self.args)
        self._labels_are_planned = loading.labels_are_planned(self.data_collator)
        return self._order

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        own = isinstance(eval_dataset, PackMixture)
        return loading.evaluation_order(eval_dataset, self.args) if own else super()._get_eval_sampler(eval_dataset)

    def _run_epoch(self, *args, **kwargs) -> None:
        # Trainer looks only after a step whether it was the last: a finished run, started again, would take one more.
        if self._at_end:
            self.control.should_training_stop = True
            return
        if self._order is not None:
            # Where several ranks resume within an epoch, neither Trainer nor accelerate reaches the sampler.
            self._order.set_epoch(kwargs["epoch"])
        loading.prepare_loader(kwargs["train_dataloader"])
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of a step, and the labels in them on all ranks."""
        if self._labels_are_planned:
            planned = self._meter.planned_labels = self._order.labels_of_step(self.state.global_step)
            return MicroBatches(epoch_iterator, num_batches, self._meter.wait), torch.full((), planned, device=device)
        start = time.perf_counter()
        batches, labels = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._meter.wait(time.perf_counter() - start)
        self._step_is_empty = loading.no_label_on_any_rank(batches, labels)
        return batches, labels

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of every parameter of two and more dimensions; biases and norms have one."""
        return optimization.decayed_parameters(model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that `args` names, with the learning rates of the parts."""
        created = self.optimizer is None
        if created and self.args.optim == MUON:
            self.optimizer = muon_and_adamw(model or self.model, self.args)
        optimizer = super().create_optimizer(model)
        if created:
            named, parts = (model or self.model).named_parameters(), self._family.parts
            self._parts_of_groups = optimization.set_part_learning_rates(optimizer, named, self.args, parts)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """The schedule that `args` names, without the zeros at its ends."""
        created = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps + 1, optimizer)
        if created:
            optimization.enter_schedule(scheduler)
        return scheduler

    def _get_learning_rate(self) -> float:
        # Trainer asks right before the schedule moves on, and logs the first group's alone.
        self.part_rates = optimization.rates_by_part(self._parts_of_groups, self.lr_scheduler)
        return super()._get_learning_rate()

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run a micro-batch as `Trainer` does and count it; `packing_stats` is taken out of it."""
        stats, config = inputs.pop("packing_stats"), optimization.base_model(self.model).config
        self._micro_batch_flops = self._family.step_flops(config, step_work(stats), self._trained)
        loss = super().training_step(model, self._copies(inputs), num_items_in_batch)
        self._meter.micro_batch(stats, self._micro_batch_flops, loss, self._row_losses)
        if self._labels_are_planned and self.accelerator.sync_gradients:
            self._step_is_empty = correct_gradients(model.parameters(), self._meter)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The model's own loss, and not that of a trainer in between."""
        if self._gives_row_losses:
            inputs = {**inputs, "return_row_losses": True}
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        self._row_losses = outputs.get("row_losses")
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> torch.Tensor | float:
        self._grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self._step_is_empty:
            # The last thing before the optimizer's step, which then moves nothing.
            optimization.drop_gradients(model)
        return self._grad_norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of the last micro-batch, for `state.total_flos`; Trainer's own estimate knows no images."""
        return self._micro_batch_flops

    def _end_step(self) -> None:
        """After each optimizer step, on every rank: account, judge, and leave if asked to."""
        self._average.update(self.model, self.state.global_step)
        self._meter.end_step(self.state.global_step, self._grad_norm, self.stop_request.requested)
        control = self.control
        self._account(control.should_log or control.should_save or control.should_evaluate or self._at_end)
        if control.should_training_stop:
            self._account(True)

    def _account(self, all_steps: bool) -> None:
        steps, watches = self._meter.finished(all_steps), (self._callback(LossWatch), self._callback(DataWatch))
        describe = getattr(self.train_dataset, "describe", None)
        asked_to_leave = account(steps, self.throughput, *watches, self.args, describe, self.state.max_steps)
        if asked_to_leave and not self._at_end:
            self.interrupted = self.control.should_save = self.control.should_training_stop = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete a training log by the figures of its window; every rank calls with the same keys."""
        if "loss" in logs:
            # Trainer's own loss starts anew after an interruption; the window's does not.
            logs.update(self.throughput.close_window(self.args.device, self.args.world_size, self.source_names))
            logs.update(self.part_rates)
        Trainer.log(self, logs, start_time)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        # Before a checkpoint is saved, so that its log has the scores. Who was asked to leave has seconds.
        state, evaluates = self.state, self.control.should_evaluate
        if not self.interrupted and self._tasks.are_due(state.global_step, state.max_steps, evaluates):
            self.evaluate_tasks()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    evaluate_tasks = evaluate_tasks

    def _readable(self, dataset: Any) -> Any:
        return dataset

    def evaluate(self, eval_dataset: Any = None, *args, **kwargs) -> dict[str, float]:
        """Evaluate, on what the trainer takes as `eval_dataset`."""
        with self._average.in_model(self.model):
            return super().evaluate(self._readable(eval_dataset), *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        """Loss, logits and labels of a batch, the last two None where only the loss is wanted."""
        stats = inputs.pop("packing_stats")
        self._evaluated.dropped += sum(stats["dropped"].values())
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            total, row_losses = loss_sum(model, inputs, self._gives_row_losses)
        self._evaluated.add(total.item(), stats["rows"], row_losses)
        return total / max(sum(row["labels"] for row in stats["rows"]), 1), None, None

    def evaluation_loop(self, dataloader: DataLoader, *args, metric_key_prefix: str = "eval", **kwargs) -> Any:
        """Evaluate; the loss is a mean over labels, where `Trainer`'s is a mean of the batches' means."""
        loading.shield_workers(dataloader)
        dataset = dataloader.dataset
        self._evaluated = Evaluated(dataset.names if isinstance(dataset, PackMixture) else [])
        with self.throughput.paused():
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._evaluated.metrics(self.args.device, self.args.world_size)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def summary(self) -> dict[str, Any]:
        """What the whole training did, see [`training_summary`], and the latest scores of `eval_tasks`."""
        args = self.args
        summary = training_summary(self.throughput, self.state, self.source_names, args.device, args.world_size)
        return {**summary, "eval_tasks": latest_scores(self.state.log_history)} if args.eval_tasks else summary

    def create_model_card(self, model_name: str | None = None, license: str | None = None, **kwargs) -> None:
        """Write the card of this run into `output_dir`, whence pushes take it; what is not in it is not passed on."""
        write_trainer_card(self, self.args.output_dir, license=license)

    def run_record(self) -> dict[str, Any]:
        """What a checkpoint of this run is marked with: all that decides what a step does to the weights."""
        data = getattr(self.train_dataset, "fingerprint", None)
        return {**run_record(self.args, data, self._weights_record), "fsdp": self.is_fsdp_enabled}

    def checkpoint_to_resume(self, asked: str | bool | None = True) -> str | None:
        """The checkpoint that [`train`] would resume from: the one asked for, or the newest complete one."""
        return resuming.checkpoint_to_resume(asked, self.args.output_dir, self.run_record(), self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> Any:
        """Train as `Trainer.train` does, alone in `output_dir`, to the end or until SIGTERM.

        `resume_from_checkpoint` is a checkpoint's folder, or True for the newest complete one, if there is any.

        Raises:
            ValueError: if the checkpoint is incomplete, of another run or model, or `output_dir` is in use.
            CheckpointError: if a checkpoint cannot be written.
            TrainingStopped: for a loss that is not finite or rose too far, no labels, or too many lost documents.
        """
        checkpoint, self.interrupted = self.checkpoint_to_resume(resume_from_checkpoint), False
        alone = only_run_in(self.args.output_dir, self.args.should_save)
        with alone, self.stop_request.listening(), self._staging.finishing(), liger_off():
            return super().train(checkpoint, *args, **kwargs)

    def _finalize_training(self, *args, **kwargs) -> Any:
        # It may load the best checkpoint, or delete all others.
        self._staging.finish()
        return super()._finalize_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load = functools.partial(super()._load_from_checkpoint, model=model)
        resuming.load_checkpoint(load, resume_from_checkpoint, self.model, self._average)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A tied head is not missing; what else differs is no matter for a warning.
        missing = saving.without_tied(load_result.missing_keys, self.model)
        resuming.check_weight_names(set(missing), set(load_result.unexpected_keys), "the checkpoint")

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging.folder(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # While the data are in doubt the checkpoints from before are worth keeping.
        doubtful = self._callback(DataWatch).doubtful(self.args.max_dropped_share)
        limit = None if doubtful else self.args.save_total_limit
        with self.throughput.paused():
            save = functools.partial(super()._save_checkpoint, model, trial)
            saving.save_checkpoint(self, Path(self._get_output_dir(trial)), save, limit)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer would upload in the background from a folder that is about to be renamed.
        if not self._staging.active:
            with saving.pushed_apart(self.args):
                self.create_model_card()
                super()._push_from_checkpoint(checkpoint_folder)

    push_to_hub = saving.push_to_hub

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, with `ema_decay` its average, as a folder that `from_pretrained` reads; all ranks call."""
        if _internal_call:
            return super().save_model(output_dir, True)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        with saving.consolidated(plugin), self._average.in_model(self.model):
            super().save_model(output_dir)

    _save = background.save_weights
    _save_optimizer_and_scheduler = background.save_optimizer_and_scheduler
