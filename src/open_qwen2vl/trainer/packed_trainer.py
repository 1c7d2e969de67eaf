"""transformers' Trainer on packs of documents.

Everything of the stock Trainer stays: accelerate, FSDP2, schedulers, checkpoints, reporting. Added are the choice of
the parts that train, weight decay that reaches every matrix, an evaluation loss per token, the throughput in every
log, and a resume that loses no count. The loss is the model's own, normalised over the whole accumulated batch.
"""

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from ..processing.collator import PackingCollator
from .arguments import PackedTrainingArguments
from .progress import ThroughputProgressCallback
from .throughput import ThroughputCallback, rates, step_flops, sum_over_ranks


class PackedTrainer(Trainer):
    """Trains on the batches of a [`PackingCollator`].

    Args:
        model (`PreTrainedModel`): with `model.vision_tower`, `model.multi_modal_projector` and
            `model.language_model`. Its parameters are frozen or not as `args` says.
        args ([`PackedTrainingArguments`]): the arguments.
        data_collator (`Callable`, *optional*): a [`PackingCollator`] by default.
        callbacks (`list[TrainerCallback]`, *optional*): besides those of this class.
        kwargs: all else that `transformers.Trainer` takes.

    Raises:
        ValueError: under FSDP version 1.
    """

    def __init__(
        self, model: PreTrainedModel, args: PackedTrainingArguments, data_collator=None, callbacks=None, **kwargs
    ):
        choose_trained_parts(model, args.train_projector, args.train_language_model, args.train_vision_tower)
        # A cache would join the documents of a pack. Trainer switches it off in the top config only.
        model.config.text_config.use_cache = False
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator if data_collator is not None else PackingCollator(),
            callbacks=[ThroughputCallback(), *(callbacks or [])],
            **kwargs,
        )
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise ValueError(
                "FSDP version 1 flattens parameters, so that weight decay finds no matrix; use fsdp_version: 2"
            )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ThroughputProgressCallback)
        self._model_class = type(model)
        self._micro_batch_flops = 0
        self._evaluated = [0.0, 0.0, 0.0]  # sum of losses, labels, dropped documents on this rank

    @property
    def throughput(self) -> ThroughputCallback:
        """The run's counters (looked up, because Trainer may replace callbacks when it restores their states)."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, ThroughputCallback))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Every parameter of two and more dimensions; biases and norms have one.

        Args:
            model (`nn.Module`): the model.

        Returns:
            `list[str]`: their names.
        """
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """The schedule that `args` names, without the zeros at its ends.

        transformers' warm-ups start at 0 and its decays end there: a step at either end would train nothing. Here the
        schedule is one step longer than the training and entered one step in.

        Args:
            num_training_steps (`int`): steps of the training.
            optimizer (`torch.optim.Optimizer`, *optional*): the trainer's own by default.

        Returns:
            `torch.optim.lr_scheduler.LRScheduler`: the schedule.
        """
        created = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps + 1, optimizer)
        if created and isinstance(scheduler, LambdaLR):
            with warnings.catch_warnings():
                # torch warns that no optimizer step came before: that is what is wanted.
                warnings.simplefilter("ignore", UserWarning)
                scheduler.step()
        return scheduler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Count the micro-batch, then run it as `Trainer` does.

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
            self.args.train_projector,
            self.args.train_language_model,
            self.args.train_vision_tower,
        )
        self.throughput.count(stats, self._micro_batch_flops)
        return super().training_step(model, inputs, num_items_in_batch)

    def _run_epoch(self, *args, **kwargs) -> None:
        # Trainer looks only after a step whether it was the last: a finished run, started again, would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A tied head is not in the file and not missing either.
        tied = self.model.all_tied_weights_keys
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of the last micro-batch, for `state.total_flos`; Trainer's own estimate knows no images."""
        return self._micro_batch_flops

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete a training log by the throughput of its window.

        Args:
            logs (`dict`): the log; every rank calls with the same keys.
            start_time (`float`, *optional*): start of the training.
        """
        if "loss" in logs:
            logs.update(self.throughput.close_window(self.args.device, self.args.world_size))
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Evaluate a batch, without logits where only the loss is wanted.

        Args:
            model (`nn.Module`): the model.
            inputs (`dict`): a batch of the collator; `packing_stats` is taken out of it.
            prediction_loss_only (`bool`): whether logits are not needed.
            ignore_keys (`list[str]`, *optional*): outputs to leave out.

        Returns:
            `tuple`: loss, logits and labels, the last two None with `prediction_loss_only`.
        """
        stats = inputs.pop("packing_stats")
        self._evaluated[2] += sum(stats["dropped"].values())
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"][..., 1:].ne(-100).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            # A divisor of 1 leaves the sum over labels, whatever this batch's share of them is.
            loss_sum = model(**inputs, num_items_in_batch=1, skip_logits=True)["loss"]
        self._evaluated[0] += loss_sum.item()
        self._evaluated[1] += labels.item()
        return loss_sum / labels.clamp(min=1), None, None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """Evaluate; the loss is a mean over labels, where `Trainer`'s is a mean of the batches' means.

        Args:
            args: as for `Trainer.evaluation_loop`.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): begins every metric's name.
            kwargs: as for `Trainer.evaluation_loop`.

        Returns:
            `EvalLoopOutput`: with the metrics `eval_loss` and `eval_dropped_documents`. On several ranks the last
            packs are repeated until every rank has as many, and count again.
        """
        self._evaluated = [0.0, 0.0, 0.0]
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss_sum, labels, dropped = sum_over_ranks(self._evaluated, self.args.device, self.args.world_size)
        if labels:
            output.metrics[f"{metric_key_prefix}_loss"] = loss_sum / labels
        output.metrics[f"{metric_key_prefix}_dropped_documents"] = int(dropped)
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as a folder that `from_pretrained` reads, under FSDP too; every rank must call it.

        Args:
            output_dir (`str`, *optional*): the folder; `args.output_dir` by default.
        """
        if _internal_call or not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        # Sharded state is for checkpoints, and those stay as they were configured.
        plugin = self.accelerator.state.fsdp_plugin
        configured = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir)
        plugin.set_state_dict_type(configured)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # FSDP2 gives the model a class made on the spot; the saved code and auto_map must be those of its own.
        current = type(self.model)
        self.model.__class__ = self._model_class
        super()._save(output_dir, state_dict)
        self.model.__class__ = current

    def summary(self) -> dict[str, Any]:
        """What the whole training did, over all runs that it took.

        Returns:
            `dict`: `steps`, `epochs`, `documents`, `images`, `tokens`, `flops`, `train_seconds` (without evaluation
            and checkpoints), the mean [`rates`], `devices`, `final_loss` (the last log's) and `dropped_documents`
            by reason.
        """
        totals = dict(self.throughput.totals)
        seconds = totals.pop("seconds")
        return {
            "steps": self.state.global_step,
            "epochs": self.state.epoch,
            **totals,
            "train_seconds": seconds,
            **rates(totals, seconds, self.args.device, self.args.world_size),
            "devices": self.args.world_size,
            "final_loss": next((log["loss"] for log in reversed(self.state.log_history) if "loss" in log), None),
            "dropped_documents": self.throughput.dropped,
        }


def choose_trained_parts(model: PreTrainedModel, projector: bool, language_model: bool, vision_tower: bool) -> None:
    """Freeze what is not to be trained.

    Args:
        model (`PreTrainedModel`): changed in place.
        projector (`bool`): train the projector.
        language_model (`bool`): train embeddings, blocks and head.
        vision_tower (`bool`): train the vision tower.
    """
    model.requires_grad_(language_model)
    model.model.multi_modal_projector.requires_grad_(projector)
    model.model.vision_tower.requires_grad_(vision_tower)
