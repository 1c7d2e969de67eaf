"""Evaluation on packs: a mean over labels, of each source too, without logits, each pack once whatever the ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .figures.throughput import sum_over_ranks


def loss_sum(model: nn.Module, inputs: dict[str, Any], row_losses: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum of the losses of a batch's labels, and of each row's `(rows,)` where the model gives them."""
    # A divisor of 1 leaves the sum over labels, whatever this batch's share of them is.
    options: dict[str, Any] = {"num_items_in_batch": 1, "skip_logits": True}
    if row_losses:
        options["return_row_losses"] = True
    output = model(**inputs, **options)
    return output["loss"], output.get("row_losses")


class Evaluated:
    """What an evaluation adds up on a rank; `names` are the sources of a mixture, none of other data."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.dropped = 0
        self._loss = self._labels = 0.0
        self._source_losses = [0.0] * len(names)
        self._source_labels = [0] * len(names)

    def add(self, loss_sum: float, rows: list[dict[str, int]], row_losses: torch.Tensor | None) -> None:
        """Add a batch: the sum of its labels' losses, its rows, and the same sum of each row `(rows,)`."""
        self._loss += loss_sum
        self._labels += sum(row["labels"] for row in rows)
        if not self.names or row_losses is None:
            return
        for row, loss in zip(rows, row_losses.tolist(), strict=True):
            self._source_losses[row["source"]] += loss
            self._source_labels[row["source"]] += row["labels"]

    def metrics(self, device: torch.device, world_size: int) -> dict[str, float]:
        """`loss` and `loss/NAME` of what has labels, nats per label, and `dropped_documents`; every rank must call."""
        figures = [self.dropped, self._loss, self._labels, *self._source_losses, *self._source_labels]
        dropped, loss, labels, *sources = sum_over_ranks(figures, device, world_size)
        metrics = {"loss": loss / labels} if labels else {}
        if len(self.names) > 1:
            losses, counts = sources[: len(self.names)], sources[len(self.names) :]
            for name, loss, labels in zip(self.names, losses, counts, strict=True):
                if labels:
                    metrics[f"loss/{name}"] = loss / labels
        return {**metrics, "dropped_documents": int(dropped)}
