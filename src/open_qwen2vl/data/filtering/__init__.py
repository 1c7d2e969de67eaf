"""From scores to the list of the pairs that stay: the step `filter`. selection.py has the flow of it."""

from ...lazy_names import lazy_names

_MODULES = {
    "FilterOptions": ".options",
    "SelectionReport": ".report",
    "select_pairs": ".selection",
}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
