"""From scores to the list of the pairs that stay: the step `filter`. selection.py has the flow of it."""

from .report import SelectionReport
from .selection import select_pairs

__all__ = ["SelectionReport", "select_pairs"]
