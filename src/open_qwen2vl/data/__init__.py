"""From tars of samples to packs that a loader reads.

tars ─ shards.py: index of the headers ─ captions.py: documents and their lengths ─ packing.py: which share a pack
  │                                                                                          │
  │            plan.py runs this, one task for each group of tars ──────────────► packs/ (plan_files.py)
  │                                                                                          │
  └── bytes by offset ──► packed_dataset.py: input_ids, position_ids, labels (S,), pixel_values (images, 3, H, W)
"""

from .packed_dataset import PackedDataset
from .packing import pack_lengths
from .plan import plan_packs
from .plan_report import PlanReport
from .shards import find_shards, index_shard

__all__ = ["PackedDataset", "PlanReport", "find_shards", "index_shard", "pack_lengths", "plan_packs"]
