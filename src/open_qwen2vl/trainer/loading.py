"""What the trainers read: order and collator of the packs, names of their sources, steps without a label."""

import inspect
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from ..data.documents.documents import RANGES, Remote
from ..data.packing.mixture import PackMixture
from ..data.packing.pack_order import PackOrder
from ..data.packing.packed_dataset import PackedDataset, check_files
from ..data.packing.plan_files import read_plan
from ..data.packing.sources import parse_sources
from ..data.storage.shard_cache import ShardCache
from ..families import document_processor
from ..places import place
from ..processing.collator import PackingCollator
from .arguments import PackedArguments

# Of a patch of 16 x 16 pixels, the largest of the known families; what else a pack holds is small beside its pixels.
_PATCH_BYTES = 3 * 16**2
logger = logging.getLogger(__name__)

CACHE_GB = 100.0  # of a cache whose size is not given
_OF_PLANS = ("cache_dir", "shuffle_window", "read_patience")
_SHARED_MEMORY = Path("/dev/shm")


def read_packs(packs: str | list[dict[str, Any]], processor: Any, args: PackedArguments | None = None) -> PackMixture:
    """The packs that an option of a recipe names; every rank must call. `args` say how buckets are read.

    The first rank looks whether their files are as they were planned, and tells the others: a large plan has so many
    files that a file system would answer all ranks for minutes.

    Raises:
        ValueError: as [`PackMixture`], on all ranks alike.
    """
    sources = parse_sources(packs)
    outcome: list[str | None] = [None]
    if PartialState().is_main_process:
        try:
            for source in sources:
                check_files(place(source.path), read_plan(place(source.path)))
        except (ValueError, OSError) as error:
            outcome = [str(error)]
    broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise ValueError(outcome[0])
    mixture = PackMixture(sources, processor, files_checked=True, remote=RANGES if args is None else _remote(args))
    if args is not None and args.cache_dir and not any(dataset.is_remote for dataset in mixture.datasets):
        logger.warning("cache_dir is not used: the files of %s are on this machine", ", ".join(mixture.names))
    return mixture


def _remote(args: PackedArguments) -> Remote:
    cache = ShardCache(args.cache_dir, int((args.cache_gb or CACHE_GB) * 1e9)) if args.cache_dir else None
    return Remote(args.read_patience, cache)


def prefetch_factor(args: TrainingArguments, train_dataset: Dataset | None) -> int | None:
    """Batches that each worker loads ahead: as asked, else all of the next optimizer step, if shared memory has room.

    Fewer would be loaded in the time of a step and then waited for: a step takes its batches faster than they come.
    """
    workers, asked = args.dataloader_num_workers, args.dataloader_prefetch_factor
    if asked is not None or not workers or not isinstance(train_dataset, PackMixture):
        return asked
    wanted = -(-args.gradient_accumulation_steps // workers)
    if _SHARED_MEMORY.is_dir():
        batch = args.per_device_train_batch_size * max(1, train_dataset.patches_per_pack.mean()) * _PATCH_BYTES
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        wanted = min(wanted, int(shutil.disk_usage(_SHARED_MEMORY).free / 2 / ranks / workers / batch))
    return max(2, wanted)


def prepare_loader(loader: DataLoader) -> None:
    """Before an epoch: batches stay on the host, where accelerate would copy them in the stream that computes."""
    loader.device = None
    shield_workers(loader)


def shield_workers(loader: DataLoader) -> None:
    """Have a loader's workers out of the way of signals to the training."""
    loader = getattr(loader, "base_dataloader", loader)  # accelerate's own, which starts them
    if not isinstance(loader.worker_init_fn, _WorkerStart):
        loader.worker_init_fn = _WorkerStart(loader.worker_init_fn)


@dataclass
class _WorkerStart:
    """Starts a loader's worker in a process group of its own.

    A launcher sends SIGTERM to the whole group of a training. A worker that died of it would end the training in an
    error, before its checkpoint. Workers end with their training, which they watch.
    """

    start: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        os.setpgid(0, 0)
        if self.start is not None:
            self.start(worker)


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
        run=(args.num_train_epochs, args.max_steps),
        window=args.shuffle_window,
    )


def labels_are_planned(collator: Any) -> bool:
    """Whether batches have the labels that the plans count; a collator of the user's own may choose others."""
    return type(collator) is PackingCollator and not collator.cross_document_attention


def check_sources(
    model: nn.Module, args: TrainingArguments, collator: Any, train_dataset: Any, eval_dataset: Any
) -> None:
    """Refuse what is asked of sources and would have no effect, or cannot be had in this run."""
    if isinstance(eval_dataset, PackMixture):
        evaluation_order(eval_dataset, args)
    if not isinstance(train_dataset, PackMixture):
        for name in _OF_PLANS:
            if getattr(args, name) != getattr(type(args), name):
                raise ValueError(f"{name} has no effect here: it says how the packs of a plan are read (train_packs)")
        return
    if args.train_sampling_strategy != "random":
        raise ValueError("train_sampling_strategy is not supported: packs come in an order of their own")
    train_order(train_dataset, args)
    if train_dataset.loss_weights is None:
        return
    if collator is not None and not labels_are_planned(collator):
        raise ValueError("loss_weight of a source needs the default collator")
    if "loss_weights" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"loss_weight of a source is not supported: {type(model).__name__} takes no loss_weights")


def evaluation_order(dataset: PackMixture, args: TrainingArguments) -> PackOrder:
    """Filled up with empty packs: no pack is evaluated twice for the sake of a rank."""
    if any(source.follows_run or source.loss_weight != 1 for source in dataset.sources):
        raise ValueError("eval_packs take no loss_weight, max_epochs or schedule of weights: they are of a training")
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


def keep_video_options(processor: Any, dataset: Any) -> None:
    """Give the processor that is saved with the model the videos of its plan; of a mixture those of the last one."""
    for packs in getattr(dataset, "datasets", [dataset]) if processor is not None else ():
        if isinstance(packs, PackedDataset) and packs.plan["totals"].get("videos"):
            document_processor(processor, packs.plan["vision"], packs.plan.get("chat_template_name")).keep_options()
