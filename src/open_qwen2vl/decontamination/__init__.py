"""Which samples of a pool are copies of evaluation pictures or hold evaluation texts: the step `decontaminate`.

sets ─ sets.py ─ index.py: crops (pictures.py), n-grams (texts.py) ─► OUTPUT/contaminated/against
                     │ attacks.py: what is found of pictures changed in known ways
tars ─ a task each ──┴─ pool.py ─► OUTPUT/contaminated/TAR.parquet, report.json, report.html

The floor is that of neither `data` nor `evaluation`: here they meet.
"""

from ..lazy_names import lazy_names

_MODULES = {"DecontaminateOptions": ".options", "DecontaminationReport": ".report", "decontaminate": ".pool"}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
