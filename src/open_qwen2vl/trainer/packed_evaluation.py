"""Evaluation on packs: a mean over labels, of each source too, without logits, each pack once whatever the ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.trainer_utils import EvalLoopOutput

from ..data.packing.mixture import PackMixture
from ..data.packing.pack_order import PackOrder
from .figures.throughput import sum_over_ranks


class PackedEvaluation:
    """The part of [`PackedTraining`] that evaluates; in front of a `Trainer`."""

    def __init__(self, *args, **kwargs):
        self._evaluated = Evaluated([])
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
        self._evaluated.dropped += sum(stats["dropped"].values())
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        # A divisor of 1 leaves the sum over labels, whatever this batch's share of them is.
        options = {"num_items_in_batch": 1, "skip_logits": True}
        if self._gives_row_losses:
            options["return_row_losses"] = True
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs, **options)
        loss_sum = output["loss"]
        self._evaluated.add(loss_sum.item(), stats["rows"], output.get("row_losses"))
        return loss_sum / max(sum(row["labels"] for row in stats["rows"]), 1), None, None

    def evaluation_loop(
        self, dataloader: DataLoader, *args, metric_key_prefix: str = "eval", **kwargs
    ) -> EvalLoopOutput:
        """Evaluate; the loss is a mean over labels, where `Trainer`'s is a mean of the batches' means.

        Args:
            dataloader (`DataLoader`): of batches of the collator.
            args: as for `Trainer.evaluation_loop`.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): begins every metric's name.
            kwargs: as for `Trainer.evaluation_loop`.

        Returns:
            `EvalLoopOutput`: with the metrics `eval_loss`, `eval_dropped_documents` and, where the data are a mixture
            of several sources, `eval_loss/NAME` of each.
        """
        dataset = dataloader.dataset
        self._evaluated = Evaluated(dataset.names if isinstance(dataset, PackMixture) else [])
        with self.throughput.paused():
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._evaluated.metrics(self.args.device, self.args.world_size)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output


class Evaluated:
    """What an evaluation adds up on a rank.

    Args:
        names (`Sequence[str]`): the sources of the data; none where they are no mixture.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.dropped = 0
        self._loss = self._labels = 0.0
        self._source_losses = [0.0] * len(names)
        self._source_labels = [0] * len(names)

    def add(self, loss_sum: float, rows: list[dict[str, int]], row_losses: torch.Tensor | None) -> None:
        """Add a batch.

        Args:
            loss_sum (`float`): the sum of its labels' losses.
            rows (`list[dict]`): its rows, as the collator describes them.
            row_losses (`torch.Tensor` of shape `(rows,)`, *optional*): the same sum of each row.
        """
        self._loss += loss_sum
        self._labels += sum(row["labels"] for row in rows)
        if not self.names or row_losses is None:
            return
        for row, loss in zip(rows, row_losses.tolist(), strict=True):
            self._source_losses[row["source"]] += loss
            self._source_labels[row["source"]] += row["labels"]

    def metrics(self, device: torch.device, world_size: int) -> dict[str, float]:
        """Sum up the ranks; every rank must call.

        Args:
            device (`torch.device`): the training device.
            world_size (`int`): number of ranks.

        Returns:
            `dict`: `loss` and `loss/NAME`, nats per label, of what has labels, and `dropped_documents`.
        """
        figures = [self.dropped, self._loss, self._labels, *self._source_losses, *self._source_labels]
        dropped, loss, labels, *sources = sum_over_ranks(figures, device, world_size)
        metrics = {"loss": loss / labels} if labels else {}
        if len(self.names) > 1:
            losses, counts = sources[: len(self.names)], sources[len(self.names) :]
            for name, loss, labels in zip(self.names, losses, counts, strict=True):
                if labels:
                    metrics[f"loss/{name}"] = loss / labels
        return {**metrics, "dropped_documents": int(dropped)}
