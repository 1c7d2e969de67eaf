"""How each score of an expression is spread over the pairs that it keeps and drops."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .decisions import Selection
from .expression import Comparison, Top, clauses
from .tables import fetch_row, one_in

MAX_BARS = 60
SAMPLED_ROWS = 200_000  # from which the range of a histogram is read
_TAILS = 0.002  # of the pairs at each end; they go into the first and the last bar


class Histogram(NamedTuple):
    """How a score is spread over kept and dropped pairs."""

    name: str  # the score
    low: float  # where the first bar begins; it also holds what is smaller
    width: float  # of a bar; the last one also holds what is larger
    kept: list[int]  # pairs of each bar
    dropped: list[int]  # pairs of each bar
    marks: list[tuple[str, float]]  # clauses and the numbers that they compare with


def histograms(selection: Selection) -> list[Histogram]:
    """Count the pairs of each score's bars."""
    found = []
    for name, number in selection.columns.scores.items():
        marks = [
            (clause.text, clause.number if isinstance(clause, Comparison) else selection.cuts[clause].threshold)
            for clause in clauses(selection.term)
            if isinstance(clause, Comparison | Top) and clause.name == name
        ]
        marks = [mark for mark in marks if math.isfinite(mark[1])]
        sample = _sample_scores(selection, number)
        if not len(sample):
            continue
        low, width, bars = _bars(sample, [value for _, value in marks])
        counts = np.zeros((2, bars), int)
        rows = selection.connection.execute(
            f"""
            SELECT least(greatest(floor((s{number} - $low) / $width), 0), {bars - 1})::INTEGER AS bar,
                step = {selection.kept} AS kept, count(*)
            FROM decided WHERE s{number} IS NOT NULL GROUP BY ALL
            """,
            {"low": low, "width": width},
        ).fetchall()
        for bar, kept, count in rows:
            counts[int(kept), bar] = count
        found.append(Histogram(name, low, width, counts[1].tolist(), counts[0].tolist(), marks))
    return found


def _sample_scores(selection: Selection, number: int) -> np.ndarray:
    """Scores of at most about `SAMPLED_ROWS` pairs, chosen by their uids."""
    (pairs,) = fetch_row(selection.connection, "SELECT count(*) FROM decided")
    values = selection.connection.execute(
        f"SELECT s{number} FROM decided WHERE isfinite(s{number}) AND {one_in(pairs, SAMPLED_ROWS)}"
    ).fetchnumpy()
    return np.sort(np.ma.getdata(values[f"s{number}"]).astype(np.float64))


def _bars(values: np.ndarray, marks: Sequence[float]) -> tuple[float, float, int]:
    """Beginning, width and number of the bars: whole numbers get whole widths, and thresholds lie inside."""
    tail = int(len(values) * _TAILS)
    low, high = (float(value) for value in (min([values[tail], *marks]), max([values[-1 - tail], *marks])))
    if np.array_equal(values, np.round(values)):
        low = math.floor(low)
        width = math.ceil((high - low + 1) / MAX_BARS)
        return float(low), float(width), int((high - low) // width) + 1
    if low == high:
        return low - 0.5, 1.0, 1
    return low, (high - low) / MAX_BARS, MAX_BARS
