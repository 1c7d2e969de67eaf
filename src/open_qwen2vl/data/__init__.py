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

from ..lazy_names import lazy_names

_MODULES = {
    "FilterOptions": ".filtering.options",
    "PackMixture": ".packing.mixture",
    "PackOrder": ".packing.pack_order",
    "PackedDataset": ".packing.packed_dataset",
    "PackOptions": ".packing.options",
    "PlanReport": ".packing.plan_report",
    "ReshardOptions": ".resharding.options",
    "ScoreOptions": ".scoring.options",
    "Source": ".packing.mixture",
    "find_shards": ".storage.tars",
    "find_sources": ".documents.sources",
    "index_shard": ".storage.tars",
    "pack_lengths": ".packing.bins",
    "parse_sources": ".packing.mixture",
    "plan_packs": ".packing.plan",
    "reshard": ".resharding.resharding",
    "score_pool": ".scoring.kinds",
}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
