"""What the tables and bars of the report show: a row for each task and rule, a cell for each model, with intervals."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..benchmarks import BENCHMARKS
from ..intervals import Interval, confidence_interval
from .folders import Evaluation, is_number, sample_scores


class Cell(NamedTuple):
    """One score of one model."""

    value: float
    interval: Interval | None  # where one is known
    num_samples: int  # questions behind it


class Row(NamedTuple):
    """One task under one rule."""

    task: str
    metric: str  # the main metric
    higher_is_better: bool
    rule: str  # one sentence on how an answer is scored
    shots: int  # demonstrations in the prompt
    cells: list[Cell | None]  # one for each model, `None` where it was not evaluated on this
    categories: list[tuple[str, list[Cell | None]]]  # the same by category, in the order of the results
    paper: dict[str, float]  # the paper's scores by the name of the model; empty for tasks that it lacks
    paper_rule: str  # how the paper scored; empty for tasks that it lacks

    @property
    def in_percent(self) -> bool:
        """Whether all scores lie between 0 and 100, so that bars can be drawn."""
        return all(0 <= cell.value <= 100 for cell in self.cells if cell)


class RowKey(NamedTuple):
    """What two scores must share to stand in one row: the first fields of [`Row`]."""

    task: str
    metric: str
    higher_is_better: bool
    rule: str
    shots: int


class _TaskScores(NamedTuple):
    """One model on one task: the main cell (`None` for a metric without a value) and those of the categories."""

    cell: Cell | None
    categories: dict[str, Cell]


def build_rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    """Scores of all models, side by side where they were made by the same rule."""
    found: dict[RowKey, list[_TaskScores | None]] = {}
    for number, evaluation in enumerate(evaluations):
        for task, entry in evaluation.results["tasks"].items():
            name, shots = entry["main_metric"], entry.get("shots", evaluation.results.get("shots"))
            higher = entry["metrics"][name].get("higher_is_better", True)
            shots = shots if isinstance(shots, int) else 0
            key = RowKey(task, name, higher is not False, str(entry.get("rule", "")), shots)
            found.setdefault(key, [None] * len(evaluations))[number] = _task_scores(evaluation, task, entry)
    order = list(dict.fromkeys(key.task for key in found))
    return [_row(key, found[key]) for key in sorted(found, key=lambda key: order.index(key.task))]


def _row(key: RowKey, scores: list[_TaskScores | None]) -> Row:
    names = dict.fromkeys(name for score in scores if score for name in score.categories)
    categories = [(name, [score and score.categories.get(name) for score in scores]) for name in names]
    benchmark = BENCHMARKS.get(key.task) if key.shots == 0 else None
    return Row(
        *key,
        cells=[score and score.cell for score in scores],
        categories=categories,
        paper=dict(benchmark.paper_scores) if benchmark else {},
        paper_rule=benchmark.paper_rule if benchmark else "",
    )


def _task_scores(evaluation: Evaluation, task: str, entry: dict[str, Any]) -> _TaskScores:
    metric = entry["metrics"][entry["main_metric"]]
    scores, categories = _scores_by_sample(evaluation, task)
    cell = _cell(metric.get("value"), entry["num_samples"], scores, metric.get("stderr"))
    parts = {
        name: _cell(part.get("score"), part["num_samples"], scores[categories == name])
        for name, part in (entry.get("categories") or {}).items()
    }
    return _TaskScores(cell, parts)


def _cell(value: object, num_samples: int, scores: np.ndarray, stderr: object = None) -> Cell | None:
    """A cell, `None` if the value is no number; the harness writes words for standard errors that it lacks."""
    if not is_number(value):
        return None
    interval = confidence_interval(float(value), scores, float(stderr) if is_number(stderr) else None)
    return Cell(float(value), interval, num_samples)


def _scores_by_sample(evaluation: Evaluation, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Score (NaN: unknown) and category of each question; several answers to one, as of seeds, are averaged."""
    table = evaluation.read_samples(task)
    if table is None:
        return np.empty(0), np.empty(0, dtype=object)
    names = [str(name) for name in table["sample_id"].to_pylist()]
    _, first, question = np.unique(names, return_index=True, return_inverse=True)
    answers = np.bincount(question, minlength=len(first))
    scores = np.bincount(question, weights=sample_scores(table), minlength=len(first)) / answers
    return scores, np.array(table["category"].to_pylist(), dtype=object)[first]
