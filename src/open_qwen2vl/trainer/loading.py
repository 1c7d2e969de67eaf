"""What the trainers read: order and collator of the packs, names of their sources, steps without a label."""

from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from ..data.packing.mixture import PackMixture
from ..data.packing.pack_order import PackOrder
from ..processing.collator import PackingCollator


def pack_collator(args: TrainingArguments, train_dataset: Dataset | None) -> PackingCollator:
    """The default collator; one shape for all batches where `torch_compile` is set, so that it compiles once."""
    fixed = args.torch_compile and isinstance(train_dataset, PackMixture)
    return PackingCollator(pad_to_multiple_of=train_dataset.max_length if fixed else None)


def train_order(dataset: PackMixture, args: TrainingArguments) -> PackOrder:
    """The order of a training, the same packs in each step whatever the number of ranks."""
    return PackOrder(
        dataset,
        args.world_size,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.seed if args.data_seed is None else args.data_seed,
    )


def evaluation_order(dataset: PackMixture, args: TrainingArguments) -> PackOrder:
    """Filled up with empty packs: no pack is evaluated twice for the sake of a rank."""
    return PackOrder(dataset, args.world_size, args.per_device_eval_batch_size, 1, 0, shuffle=False)


def source_names(dataset: Dataset) -> list[str]:
    """Names of the training data's sources."""
    return dataset.names if isinstance(dataset, PackMixture) else ["packs"]


def no_label_on_any_rank(batches: list[dict[str, Any]], labels_of_all_ranks: torch.Tensor | int | None) -> bool:
    """Whether a step has nothing to learn from; all ranks come to the same answer.

    A rank with labels knows. Only one without waits for its device, which has the sum already.
    """
    own = sum(row["labels"] for batch in batches for row in batch["packing_stats"]["rows"])
    return not own and not (labels_of_all_ranks is not None and int(labels_of_all_ranks))
