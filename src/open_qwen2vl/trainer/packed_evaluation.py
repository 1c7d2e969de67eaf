"""Evaluation on packs: a mean over labels, without logits, each pack once whatever the number of ranks."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers.trainer_utils import EvalLoopOutput

from ..data.mixture import PackMixture
from ..data.pack_order import PackOrder
from .throughput import sum_over_ranks


class PackedEvaluation:
    """The part of [`PackedTraining`] that evaluates; in front of a `Trainer`."""

    def __init__(self, *args, **kwargs):
        self._evaluated = [0.0, 0.0, 0.0]  # sum of losses, labels, dropped documents on this rank
        super().__init__(*args, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        if not isinstance(eval_dataset, PackMixture):
            return super()._get_eval_sampler(eval_dataset)
        # Filled up with empty packs: no pack is evaluated twice for the sake of a rank.
        args = self.args
        return PackOrder(eval_dataset, args.world_size, args.per_device_eval_batch_size, 1, 0, shuffle=False)

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
        labels = sum(row["labels"] for row in stats["rows"])
        with torch.no_grad(), self.compute_loss_context_manager():
            # A divisor of 1 leaves the sum over labels, whatever this batch's share of them is.
            loss_sum = model(**inputs, num_items_in_batch=1, skip_logits=True)["loss"]
        self._evaluated[0] += loss_sum.item()
        self._evaluated[1] += labels
        return loss_sum / max(labels, 1), None, None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """Evaluate; the loss is a mean over labels, where `Trainer`'s is a mean of the batches' means.

        Args:
            args: as for `Trainer.evaluation_loop`.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): begins every metric's name.
            kwargs: as for `Trainer.evaluation_loop`.

        Returns:
            `EvalLoopOutput`: with the metrics `eval_loss` and `eval_dropped_documents`.
        """
        self._evaluated = [0.0, 0.0, 0.0]
        with self.throughput.paused():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss_sum, labels, dropped = sum_over_ranks(self._evaluated, self.args.device, self.args.world_size)
        if labels:
            output.metrics[f"{metric_key_prefix}_loss"] = loss_sum / labels
        output.metrics[f"{metric_key_prefix}_dropped_documents"] = int(dropped)
        return output
