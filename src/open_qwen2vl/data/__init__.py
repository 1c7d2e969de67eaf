"""From a raw pool to chosen samples, and from tars of samples, or conversations, to packs that a loader reads.

pool ─ scoring/: a value of each sample ─ filtering/: uids that stay ─ resharding.py ─► tars with a shard_index.py
       each a function of one shard, run by engine.py: here, on Ray, or dealt over ranks

tars ─ shards.py: index of the headers ─ captions.py ─────────────┐
json ─ json_records.py, tables ─ table_rows.py: where records are │
 └ records.py ─ conversations.py, interleaved.py, caption_rows.py ┼► documents ─ packing.py: which share a pack
images ─ image_files.py: where they are ──────────────────────────┘  and lengths             │
  │            plan.py runs this (sources.py), one task for each group ─────────► packs/ (plan_files.py)
  │                                                                                          │
  └── bytes by offset ──► packed_dataset.py: input_ids, position_ids, labels (S,), pixel_values (images, 3, H, W)
                            │
                            └─► mixture.py: several plans as one dataset ─ pack_order.py: what is read when, by whom
"""

from .mixture import PackMixture, Source, parse_sources
from .pack_order import PackOrder
from .packed_dataset import PackedDataset
from .packing import pack_lengths
from .plan import plan_packs
from .plan_report import PlanReport
from .resharding import reshard
from .scoring.kinds import score_pool
from .shards import find_shards, index_shard
from .sources import find_sources

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
