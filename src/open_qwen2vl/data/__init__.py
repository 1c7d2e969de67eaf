"""From a raw pool to chosen samples, and from tars of samples, or conversations, to packs that a loader reads.

pool ─ scoring/: a value of each sample ─ filtering/: uids that stay ─ resharding.py ─► tars with a tar_index.py
       each a function of one shard, run by engine.py: here, on Ray, or dealt over ranks

tars ─ tars.py: index of the headers ─ captions.py ─────────────┐
json ─ json_records.py, tables ─ tables.py: where records are │
 └ records.py ─ conversations.py, interleaved.py, caption_rows.py ┼► documents ─ bins.py: which share a pack
images ─ image_files.py: where they are ──────────────────────────┘  and lengths             │
  │            plan.py runs this (sources.py), one task for each group ─────────► packs/ (plan_files.py)
  │                                                                                          │
  └── bytes by offset ──► packed_dataset.py: input_ids, position_ids, labels (S,), pixel_values (images, 3, H, W)
                            │
                            └─► mixture.py: several plans as one dataset ─ pack_order.py: what is read when, by whom
"""

from .documents.sources import find_sources
from .packing.bins import pack_lengths
from .packing.mixture import PackMixture, Source, parse_sources
from .packing.pack_order import PackOrder
from .packing.packed_dataset import PackedDataset
from .packing.plan import plan_packs
from .packing.plan_report import PlanReport
from .resharding.resharding import reshard
from .scoring.kinds import score_pool
from .storage.tars import find_shards, index_shard

__all__ = [
    "PackMixture",
    "PackOrder",
    "PackedDataset",
    "PlanReport",
    "Source",
    "find_shards",
    "find_sources",
    "index_shard",
    "pack_lengths",
    "parse_sources",
    "plan_packs",
    "reshard",
    "score_pool",
]
