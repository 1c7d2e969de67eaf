"""From packs to the tensors of one forward: rows are packs, documents are told apart by boundaries, not by a mask.

items      input_ids, position_ids, labels (S_i,), pixel_values uint8 (images_i, 3, H, W)
  │ pad every row to the longest; the padded tail is a document of its own, labels -100
  ▼
batch      input_ids, position_ids, labels (packs, S), pixel_values (images, 3, H, W), image_seq_length,
           cu_seq_lens_q/k (documents + 1,) int32 over the flattened batch, max_length_q/k,
           label_positions (labelled,) in the flattened batch: position t where t + 1 of the row has a label
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from .text_formats import IGNORE_INDEX


@dataclass
class PackingCollator:
    """Collate packs (items of a `PackedDataset`) into a batch that isolates documents.

    Args:
        cross_document_attention (`bool`, *optional*, defaults to `False`):
            The original's way: each row is one sequence, positions run on, the last token of a document predicts the
            first of the next, and no `cu_seq_lens_*` are given.
        pad_token_id (`int`, *optional*, defaults to 0):
            Id in padded tails. Any text token will do: the tail is a document of its own without labels.
        pad_to_multiple_of (`int`, *optional*):
            Rows are padded to a multiple of this length. With that of the plan, all batches have the same shape, and
            `torch.compile` compiles once.
    """

    cross_document_attention: bool = False
    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate.

        Args:
            items (`list[dict]`): each with int64 `input_ids`, `position_ids`, `labels` of shape `(S,)`, uint8
                `pixel_values` of shape `(images, 3, H, W)` and the int `image_seq_length`.

        Returns:
            `dict`: the tensors named at the head of this file, `pixel_values` only where there are images, and
            `packing_stats` with the int counts `tokens` (no padding), `positions` (with it), `documents`, `images`,
            `squared_lengths` (sum over documents of length squared), the dict `dropped` (documents lost at reading, by
            reason), and for each row a dict in `rows`: `tokens`, `labels`, and `source` and `pack`, the numbers that
            the item has (0 and -1 where it has none).

        Raises:
            ValueError: if the items were planned for different numbers of tokens per image.
        """
        budgets = {item["image_seq_length"] for item in items}
        if len(budgets) > 1:
            raise ValueError(f"packs of different image_seq_length in one batch: {sorted(budgets)}")
        lengths = torch.cat([_document_lengths(item["position_ids"]) for item in items])
        # At least one position, so that a batch whose documents were all dropped still runs.
        longest = max(1, *(len(item["input_ids"]) for item in items))
        longest += -longest % (self.pad_to_multiple_of or 1)
        batch: dict[str, Any] = {
            "input_ids": _pad_rows([item["input_ids"] for item in items], longest, self.pad_token_id),
            "labels": _pad_rows([item["labels"] for item in items], longest, IGNORE_INDEX),
            "image_seq_length": budgets.pop(),
        }
        pixel_values = torch.cat([item["pixel_values"] for item in items])
        if len(pixel_values):
            batch["pixel_values"] = pixel_values
        if self.cross_document_attention:
            batch["position_ids"] = torch.arange(longest).expand(len(items), -1)
            batch["labels"] = self._labels_across_documents(batch["labels"], batch["input_ids"], items)
        else:
            batch.update(_isolate_documents([item["position_ids"] for item in items], longest))
        # Found here, once, on the host: on a device the model would have to wait for their number.
        labelled = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX) != IGNORE_INDEX
        batch["label_positions"] = torch.nonzero(labelled.flatten()).squeeze(1)
        batch["packing_stats"] = {
            "tokens": int(lengths.sum()),
            "positions": batch["input_ids"].numel(),
            "documents": len(lengths),
            "images": len(pixel_values),
            "squared_lengths": int(lengths.square().sum()),
            "dropped": dict(sum((Counter(item.get("dropped", {})) for item in items), Counter())),
            "rows": [
                {
                    "source": item.get("source", 0),
                    "pack": item.get("pack", -1),
                    "tokens": len(item["input_ids"]),
                    "labels": labels,
                }
                for item, labels in zip(items, labelled.sum(1).tolist(), strict=True)
            ],
        }
        return batch

    @staticmethod
    def _labels_across_documents(labels, input_ids, items) -> torch.Tensor:
        # The first token of every document but a row's first is predicted from the document before it.
        for row, item in enumerate(items):
            starts = torch.nonzero(item["position_ids"] == 0).flatten()[1:]
            labels[row, starts] = input_ids[row, starts]
        return labels


def _document_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Lengths of the documents of one row, int64: a document starts wherever a position is 0."""
    starts = torch.nonzero(position_ids == 0).flatten()
    return torch.cat([starts, torch.tensor([len(position_ids)])]).diff()


def _pad_rows(rows: list[torch.Tensor], length: int, value: int) -> torch.Tensor:
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def _isolate_documents(rows: list[torch.Tensor], length: int) -> dict[str, Any]:
    # The tail restarts at 0 like any document, so that boundaries, positions and masks all agree on it.
    padded = torch.stack([torch.cat([row, torch.arange(length - len(row))]) for row in rows])
    lengths = _document_lengths(padded.flatten())
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {
        "position_ids": padded,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }
