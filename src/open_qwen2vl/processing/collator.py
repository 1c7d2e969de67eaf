"""From packs to the tensors of one forward: rows are packs, documents are told apart by boundaries, not by a mask.

items      input_ids, labels (S_i,), position_ids (S_i,) or (rows, S_i), media by their names in the forward
  │ pad every row to the longest; the padded tail is a document of its own, labels -100; media are joined
  ▼
batch      input_ids, labels (packs, S), position_ids (packs, S) or (rows, packs, S), media, options of the forward,
           cu_seq_lens_q/k (documents + 1,) int32 over the flattened batch, max_length_q/k, key_positions (keys,),
           label_positions (labelled,) in the flattened batch: position t where t + 1 of the row has a label,
           positions of placeholders likewise, by their names in the forward

Row 0 of the positions tells documents apart: it starts at 0 in each. Where documents share a picture, the first holds
it and the others are its branches: row 0 goes back to the length of what they share. They attend to that, and to
themselves, which `key_positions` lists with the boundaries cu_seq_lens_k; without branches it is not there.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from .text_formats import IGNORE_INDEX

TEXT = ("input_ids", "labels", "position_ids")
# Of an item; what else it has goes to the forward.
ACCOUNTS = ("placeholders", "on_host", "media", "vision_work", "dropped", "dropped_places", "source", "pack",
            "loss_weight")  # fmt: skip

_WORK = ("patches", "vision_squared", "vision_tokens", "vision_windowed")


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
            items (`list[dict]`): each with int64 `input_ids` and `labels` of shape `(S,)` and `position_ids` of shape
                `(S,)` or `(rows, S)`. Other tensors are media, joined along their first dimension; other values are
                arguments of the forward, the same in all items, but for `placeholders` (int64 positions in the item,
                by the name of a forward's argument), `on_host` (names of media that become nested lists, which stay
                where they are when tensors go to a device), `media` (their number), `vision_work` (patches, squared,
                tokens, windowed, or the first of them), `dropped`, `source`, `pack` and `loss_weight` (in all items or
                in none), the batch's float32 `loss_weights` `(packs,)`.

        Returns:
            `dict`: the tensors named at the head of this file, media only where there are any, and `packing_stats`
            with the int counts `tokens` (no padding), `positions` (with it), `documents`, `images` and `media` (both
            the number of images and videos), `squared_lengths` (sum over documents of length squared, of a branch
            what it adds to that of the part it shares), `patches`, `vision_squared`, `vision_tokens` and
            `vision_windowed` (the sums of `vision_work`), the dict `dropped` (documents lost at reading, by reason),
            and for each row a dict in `rows`: `tokens`, `labels`, and `source` and `pack`, the numbers that the item
            has (0 and -1 where it has none).

        Raises:
            ValueError: if the arguments of the forward differ, as where packs were planned for different numbers of
                tokens per image.
        """
        segments = [_segments(_first_row(item["position_ids"])) for item in items]
        lengths, prefixes = (torch.cat(parts) for parts in zip(*segments, strict=True))
        # At least one position, so that a batch whose documents were all dropped still runs.
        longest = max(1, *(len(item["input_ids"]) for item in items))
        longest += -longest % (self.pad_to_multiple_of or 1)
        batch: dict[str, Any] = {
            "input_ids": _pad_rows([item["input_ids"] for item in items], longest, self.pad_token_id),
            "labels": _pad_rows([item["labels"] for item in items], longest, IGNORE_INDEX),
            **_forward_options(items),
            **_joined_media(items),
            **_placeholders(items, longest),
        }
        if self.cross_document_attention:
            if items[0]["position_ids"].dim() > 1:
                raise ValueError("cross_document_attention is for models with one row of positions")
            if prefixes.any():
                raise ValueError("cross_document_attention does not go with packs that share pictures")
            batch["position_ids"] = torch.arange(longest).expand(len(items), -1)
            batch["labels"] = self._labels_across_documents(batch["labels"], batch["input_ids"], items)
        else:
            batch.update(_isolate_documents([item["position_ids"] for item in items], longest))
        if "loss_weight" in items[0]:
            batch["loss_weights"] = torch.tensor([item["loss_weight"] for item in items], dtype=torch.float32)
        # Found here, once, on the host: on a device the model would have to wait for their number.
        labelled = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX) != IGNORE_INDEX
        batch["label_positions"] = torch.nonzero(labelled.flatten()).squeeze(1)
        batch["packing_stats"] = self._stats(items, lengths, prefixes, batch["input_ids"].numel(), labelled.sum(1))
        return batch

    @staticmethod
    def _stats(
        items: list[dict[str, Any]],
        lengths: torch.Tensor,
        prefixes: torch.Tensor,
        positions: int,
        labels: torch.Tensor,
    ) -> dict[str, Any]:
        media = sum(item["media"] if "media" in item else _first_length(item) for item in items)
        work = map(sum, zip_longest(*(item.get("vision_work", ()) for item in items), fillvalue=0))
        return {
            "tokens": int(lengths.sum()),
            "positions": positions,
            "documents": len(lengths),
            "images": media,
            "media": media,
            # Of a branch what causal attention adds to that of its prefix.
            "squared_lengths": int(((prefixes + lengths).square() - prefixes.square()).sum()),
            **dict(zip_longest(_WORK, work, fillvalue=0)),
            "dropped": dict(sum((Counter(item.get("dropped", {})) for item in items), Counter())),
            "dropped_places": dict(place for item in items for place in item.get("dropped_places", {}).items()),
            "rows": [
                {
                    "source": item.get("source", 0),
                    "pack": item.get("pack", -1),
                    "tokens": len(item["input_ids"]),
                    "labels": count,
                }
                for item, count in zip(items, labels.tolist(), strict=True)
            ],
        }

    @staticmethod
    def _labels_across_documents(labels, input_ids, items) -> torch.Tensor:
        # The first token of every document but a row's first is predicted from the document before it.
        for row, item in enumerate(items):
            starts = torch.nonzero(item["position_ids"] == 0).flatten()[1:]
            labels[row, starts] = input_ids[row, starts]
        return labels


def _forward_options(items: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name, value in items[0].items()
             if name not in (*TEXT, *ACCOUNTS) and not isinstance(value, torch.Tensor)]  # fmt: skip
    for name in names:
        values = {item[name] for item in items}
        if len(values) > 1:
            raise ValueError(f"packs of different {name} in one batch: {sorted(values)}")
    return {name: items[0][name] for name in names}


def _joined_media(items: list[dict[str, Any]]) -> dict[str, torch.Tensor | list]:
    names = [name for name, value in items[0].items() if name not in TEXT and isinstance(value, torch.Tensor)]
    joined = {name: torch.cat([item[name] for item in items]) for name in names}
    on_host = items[0].get("on_host", ())
    return {name: tensor.tolist() if name in on_host else tensor for name, tensor in joined.items() if len(tensor)}


def _placeholders(items: list[dict[str, Any]], length: int) -> dict[str, torch.Tensor]:
    """Positions of placeholders in the flattened batch, by name; none where there are none."""
    positions: dict[str, list[torch.Tensor]] = {}
    for row, item in enumerate(items):
        for name, own in item.get("placeholders", {}).items():
            positions.setdefault(name, []).append(own + row * length)
    joined = {name: torch.cat(rows) for name, rows in positions.items()}
    return {name: tensor for name, tensor in joined.items() if len(tensor)}


def _first_length(item: dict[str, Any]) -> int:
    """Images of an item that does not count them: the length of its first media tensor."""
    return next((len(v) for name, v in item.items() if name not in TEXT and isinstance(v, torch.Tensor)), 0)


def _first_row(position_ids: torch.Tensor) -> torch.Tensor:
    return position_ids if position_ids.dim() == 1 else position_ids[0]


def _segments(position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths of the documents and branches of positions that run on within each, and of the prefixes that they share
    with the document before, 0 for a document; both int64.
    """
    before = torch.nn.functional.pad(position_ids, (1, 0), value=-2)[:-1]
    starts = torch.nonzero(position_ids != before + 1).flatten()
    return torch.cat([starts, torch.tensor([len(position_ids)])]).diff(), position_ids[starts]


def _pad_rows(rows: list[torch.Tensor], length: int, value: int) -> torch.Tensor:
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def _isolate_documents(packs: list[torch.Tensor], length: int) -> dict[str, Any]:
    # The tail restarts at 0 like any document, so that boundaries, positions and masks all agree on it.
    tails = [torch.arange(length - pack.shape[-1]).expand(*pack.shape[:-1], -1) for pack in packs]
    # (packs, S) or, with several rows of positions, (rows, packs, S)
    padded = torch.stack([torch.cat([*pair], dim=-1) for pair in zip(packs, tails, strict=True)], dim=-2)
    lengths, prefixes = _segments(_first_row(padded.flatten(-2)))
    boundaries = _boundaries(lengths)
    longest = int(lengths.max())
    batch = {
        "position_ids": padded,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return {**batch, **_keys_of_branches(lengths, prefixes)} if prefixes.any() else batch


def _boundaries(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _keys_of_branches(lengths: torch.Tensor, prefixes: torch.Tensor) -> dict[str, Any]:
    """What each document or branch attends to in the flattened batch: its prefix, then itself."""
    keys, starts = prefixes + lengths, lengths.cumsum(0) - lengths
    # (segments,): where the document of each begins.
    documents = torch.where(prefixes == 0, starts, 0).cummax(0).values
    offsets = torch.arange(int(keys.sum())) - (keys.cumsum(0) - keys).repeat_interleave(keys)
    starts, documents, shared = (each.repeat_interleave(keys) for each in (starts, documents, prefixes))
    return {
        "key_positions": offsets + torch.where(offsets < shared, documents, starts - shared),
        "cu_seq_lens_k": _boundaries(keys),
        "max_length_k": int(keys.max()),
    }
