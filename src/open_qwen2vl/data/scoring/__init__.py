"""Scores of image-text pairs: what a filter chooses by.

    tars, or DataComp's tables ─ kinds.py: a task for each ─ engine.py ─► OUTPUT/NAME/TAR.parquet (score_files.py)
                                    │
      clip.py, mlm_filter.py: models │ basic.py, image_hash.py, concepts.py: cheap │ metadata.py: others' scores

scoring.py walks a tar for any of the first three, pairs.py reads it, with threads where a model is to be fed.
"""

from ...lazy_names import lazy_names

_MODULES = {
    "SCORERS": ".options",
    "ScoreOptions": ".options",
    "find_score_files": ".score_files",
    "read_score_metadata": ".score_files",
    "score_pool": ".kinds",
}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
