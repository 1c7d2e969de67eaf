"""Scores of image-text pairs: what a filter chooses by.

    tars, or DataComp's tables ─ kinds.py: a task for each ─ engine.py ─► OUTPUT/NAME/TAR.parquet (score_files.py)
                                    │
      clip.py, mlm_filter.py: models │ basic.py, image_hash.py: cheap measures │ metadata.py: others' scores

scoring.py walks a tar for any of the first three, pairs.py reads it, with threads where a model is to be fed.
"""

from .kinds import SCORERS, score_pool
from .score_files import find_score_files, read_score_metadata

__all__ = ["SCORERS", "find_score_files", "read_score_metadata", "score_pool"]
