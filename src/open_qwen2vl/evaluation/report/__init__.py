"""The report: what several evaluations gave, on one page that needs nothing else.

folders of `open-qwen2vl evaluate` → `folders` (read, label) → `scores` (rows, `intervals`) and `samples` (choose,
match across models) → `page` (HTML). Nothing here loads a model or a benchmark.
"""

from collections.abc import Sequence

from ...pages import write_page
from ...places import Place, place
from .folders import load_evaluations
from .page import render_page
from .samples import ImageStore, choose_samples
from .scores import build_rows


def write_report(folders: Sequence[str | Place], output: str | Place, samples_per_task: int = 200) -> Place:
    """Write the report of one or more evaluations.

    Args:
        folders (`Sequence[str | Place]`): outputs of `open-qwen2vl evaluate`, one for each model.
        output (`str | Place`): the page; it appears whole or not at all.
        samples_per_task (`int`, *optional*, defaults to 200): most samples shown of a task. Those on which models
            disagree come first, the others are drawn by a hash of their id: the same ones each time.

    Returns:
        `Place`: the page.

    Raises:
        ValueError: for a folder without results, results of another format, or a negative `samples_per_task`.
    """
    if samples_per_task < 0:
        raise ValueError(f"--samples-per-task={samples_per_task} must be at least 0")
    evaluations, images, output = load_evaluations(folders), ImageStore(), place(output)
    samples = choose_samples(evaluations, samples_per_task, images)
    page = render_page(evaluations, build_rows(evaluations), samples, images)
    write_page(output, page)
    return output


__all__ = ["write_report"]
