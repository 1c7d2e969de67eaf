"""The page itself: template, style and script of this folder, with all that comes from data as escaped text.

The template escapes by itself. Samples travel as JSON that cannot leave its element, and the script writes them with
`textContent` only. The page's policy lets nothing run but that very script (by its hash) and nothing load but
`data:` images, so that a mistake here would still do no harm.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from .folders import Evaluation
from .samples import ImageStore, TaskSamples
from .scores import Row

COLORS = 8  # of page.css; further models begin anew
SAMPLES_PER_VIEW = 24


def render_page(
    evaluations: Sequence[Evaluation], rows: Sequence[Row], samples: Sequence[TaskSamples], images: ImageStore
) -> str:
    """Write the page.

    Args:
        evaluations (`Sequence[Evaluation]`): the models.
        rows (`Sequence[Row]`): their scores.
        samples (`Sequence[TaskSamples]`): what is shown of each task.
        images ([`ImageStore`]): images of the samples.

    Returns:
        `str`: HTML without a reference to anything outside.
    """
    folder = Path(__file__).parent
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "percent": _percent, "flat": _flat}
    data = htmlsafe_json_dumps(_data(evaluations, samples))
    template = environment.from_string(folder.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
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
        style=Markup(style),
        script=Markup(script),
        policy="; ".join(
            (
                "default-src 'none'",
                "img-src data:",
                f"style-src {_source_hash(style)}",
                f"script-src {_source_hash(script)}",
                "base-uri 'none'",
                "form-action 'none'",
            )
        ),
    )


def _data(evaluations: Sequence[Evaluation], samples: Sequence[TaskSamples]) -> dict[str, Any]:
    return {
        "models": [evaluation.label for evaluation in evaluations],
        "colors": COLORS,
        "samplesPerView": SAMPLES_PER_VIEW,
        "tasks": [{"name": own.task, "samples": own.samples} for own in samples if own.samples],
    }


def _source_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


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
        return ", ".join(map(_flat, value))
    return "—" if value is None or value == "" else str(value)
