"""The page itself: body, style and script of this folder in the frame of pages.py, all that comes from data escaped.

The template escapes by itself. Samples travel as JSON that cannot leave its element, and the script writes them with
`textContent` only. The page's policy lets nothing run but that very script (by its hash) and nothing load but
`data:` images, so that a mistake here would still do no harm.
"""

import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template
from jinja2.utils import htmlsafe_json_dumps

from ...pages import page
from .folders import Evaluation
from .samples import ImageStore, TaskSamples
from .scores import Row

COLORS = 8  # of page.css; further models begin anew
SAMPLES_PER_VIEW = 24


def render_page(
    evaluations: Sequence[Evaluation], rows: Sequence[Row], samples: Sequence[TaskSamples], images: ImageStore
) -> str:
    """The page of the report: HTML without a reference to anything outside."""
    folder = Path(__file__).parent
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    data = htmlsafe_json_dumps(_data(evaluations, samples), dumps=partial(json.dumps, allow_nan=False))
    body = _template(folder / "page.html.jinja").render(
        evaluations=evaluations,
        rows=rows,
        samples=samples,
        paper_models=list(dict.fromkeys(name for row in rows for name in row.paper)),
        methods={cell.interval.method for row in rows for cell in row.cells if cell and cell.interval},
        limited=[evaluation for evaluation in evaluations if (evaluation.results.get("options") or {}).get("limit")],
        images=images.urls,
        data=data,
        size=(len(data) + sum(map(len, images.urls))) / 1e6,
        colors=COLORS,
    )
    title = "Evaluation: " + ", ".join(evaluation.label for evaluation in evaluations)
    return page(title, body, style, script)


@cache
def _template(path: Path) -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "percent": _percent, "flat": _flat}
    return environment.from_string(path.read_text(encoding="utf-8"))


def _data(evaluations: Sequence[Evaluation], samples: Sequence[TaskSamples]) -> dict[str, Any]:
    return {
        "models": [evaluation.label for evaluation in evaluations],
        "colors": COLORS,
        "samplesPerView": SAMPLES_PER_VIEW,
        "tasks": [{"name": own.task, "samples": own.samples} for own in samples if own.samples],
    }


def _number(value: float) -> str:
    """A score as the tables show it."""
    return f"{value:,.1f}"


def _percent(value: float) -> str:
    """A place on an axis from 0 to 100; what lies outside is drawn at its end."""
    return f"{min(max(value, 0.0), 100.0):.2f}%"


def _flat(value: Any) -> str:
    """A value of a results file on one line: `name value` pairs of a dictionary."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(own)}" for name, own in value.items() if own is not None) or "—"
    if isinstance(value, list):
        return ", ".join(map(_flat, value)) or "—"
    return "—" if value is None or value == "" else str(value)
