"""From a raw pool to chosen samples, and from samples of any container and form to packs that a loader reads.

pool ─ scoring/: a value of each sample ─ filtering/: uids that stay ─ resharding/ ─► tars with their index
       each a function of one shard, run by engine/: here, on Ray, or dealt over ranks

storage/     bytes by location: tars, json, csv, tables, zips, images in folders and archives
  │
documents/   records.py (containers) ─ forms.py (texts with images, conversation) ─► documents.py: location and lengths
  │                                    ids, labels, positions, media: families/
packing/     bins.py: which share a pack ─ plan.py, one task for each group ─► packs/ (plan_files.py)
             packed_dataset.py: input_ids, labels, position_ids (S,), media of a pack ─ mixture.py: several plans
             as one dataset ─ pack_order.py: what is read when, by whom
"""

from ..lazy_names import lazy_names

_MODULES = {
    "FilterOptions": ".filtering.options",
    "PackMixture": ".packing.mixture",
    "PackOrder": ".packing.pack_order",
    "PackedDataset": ".packing.packed_dataset",
    "PackOptions": ".packing.options",
    "PlanReport": ".packing.plan_report",
    "RecaptionOptions": ".recaptioning.options",
    "ReshardOptions": ".resharding.options",
    "ScoreOptions": ".scoring.options",
    "Source": ".packing.sources",
    "find_shards": ".storage.tars",
    "find_sources": ".documents.sources",
    "index_shard": ".storage.tars",
    "pack_lengths": ".packing.bins",
    "parse_sources": ".packing.sources",
    "plan_packs": ".packing.plan",
    "recaption_pool": ".recaptioning.recaption",
    "reshard": ".resharding.resharding",
    "score_pool": ".scoring.kinds",
    "select_pairs": ".filtering.selection",
}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
