"""How the answers of the quickstart's second half look: one self-contained HTML page and one picture.

Text that comes from data or from the model is escaped, pictures are embedded, and nothing is loaded from elsewhere.
"""

import io
import random
from pathlib import Path
from textwrap import fill, wrap
from typing import Any

import numpy as np
import report_pages
from matplotlib.axes import Axes
from report_pages import INK, MUTED, RIGHT, WRONG, new_figure

from open_qwen2vl import pages
from open_qwen2vl.files import renamed_when_whole
from open_qwen2vl.pages import escape
from open_qwen2vl.processing.images import decode_image

ATTRIBUTION = (
    "Pictures, questions and answers: easy-VQA by Victor Zhou (https://github.com/vzhou842/easy-VQA), from the "
    "easy-vqa package. MIT License."
)
TITLE = "The small Open-Qwen2VL, tuned to answer questions about shapes"
TYPES = {
    "color": "which colour",
    "shape": "which shape",
    "yes_no_color": "yes or no, on a colour",
    "yes_no_shape": "yes or no, on a shape",
}
BARS = (("by_type", "the model", RIGHT), ("blanked_by_type", "with grey pictures", "#8a94a0"))
BARS += (("majority_by_type", "commonest answer of the type", "#d5dae0"),)
GRID_COLUMNS, GRID_ROWS, SAMPLE_SEED = 8, 2, 1
MOST_SHOWN = 48


def headline(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that stand on top of both reports, as (value, what it is)."""
    return [
        (f"{metrics['accuracy']:.1%}", "of the test questions answered rightly"),
        (f"{metrics['blanked_accuracy']:.1%}", "the same with grey pictures"),
        (f"{metrics['majority_accuracy']:.1%}", "by the commonest answer of the type"),
        (f"{metrics['train_seconds'] / 60:.1f} min", f"training, {metrics['steps']:,} steps"),
        (f"{metrics['tokens_per_second']:,.0f}", "tokens per second"),
    ]


def subtitle(metrics: dict[str, Any]) -> str:
    """One sentence on what was trained on what."""
    return (
        f"{metrics['parameters'] / 1e6:.1f}M parameters, pre-trained on emoji; {metrics['train_questions']:,} "
        f"questions on {metrics['train_images']:,} pictures learnt, {metrics['questions']:,} on others asked. "
        "An answer counts only if it is right to the letter."
    )


def draw_bars(axes: Axes, metrics: dict[str, Any]) -> None:
    """Accuracy by type of question: the model, the model without pictures, the commonest answer."""
    kinds = list(metrics["by_type"])
    width = 0.8 / len(BARS)
    for number, (name, label, color) in enumerate(BARS):
        places = np.arange(len(kinds)) + (number - (len(BARS) - 1) / 2) * width
        shares = [metrics[name][kind] for kind in kinds]
        bars = axes.bar(places, shares, width * 0.94, color=color, label=label)
        axes.bar_label(bars, [f"{share:.2f}" for share in shares], padding=2, fontsize=9, color=INK)
    labels = [f"{TYPES[kind]}\n{metrics['questions_by_type'][kind]:,} questions" for kind in kinds]
    axes.set_xticks(range(len(kinds)), labels, color=INK)
    axes.set_ylim(0, 1.12)
    axes.set_ylabel("accuracy", color=MUTED)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.13), ncols=len(BARS), frameon=False, fontsize=9.5)
    axes.grid(axis="y", alpha=0.2)
    axes.tick_params(colors=MUTED)
    axes.spines[["top", "right"]].set_visible(False)


def answer_texts(question: Any) -> tuple[str, str]:
    """What stands below a picture: the model's answer, and the true one where that is another."""
    return question.generated or "(nothing)", "" if question.right else f"true: {question.answer}"


def draw_question(axes: Axes, question: Any) -> None:
    """A picture, below it the question, the model's answer and, where that is wrong, the true one."""
    axes.imshow(np.asarray(decode_image(question.picture.read_bytes())))
    axes.set_xticks([])
    axes.set_yticks([])
    color = RIGHT if question.right else WRONG
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=1.5)
    answer, truth = answer_texts(question)
    lines = [(line, MUTED) for line in wrap(question.question, 27)[:3]] + [(answer[:27], color), (truth, MUTED)]
    for row, (line, ink) in enumerate(lines):
        # A dollar sign would start a formula.
        text, place = line.replace("$", r"\$"), (0, -4 - 9.4 * row)
        axes.annotate(
            text, (0.5, 0), place, "axes fraction", "offset points", ha="center", va="top", fontsize=7, color=ink
        )


def write_png(path: Path, metrics: dict[str, Any], questions: list[Any]) -> None:
    """One picture: figures, accuracy by type, and a random sample of the questions with the model's answers.

    Args:
        path (`Path`): the PNG; it appears whole or not at all.
        metrics (`dict`): content of `metrics.json`.
        questions (`list[Question]`): answered test questions.
    """
    figure = new_figure(14, 9)
    figure.text(0.035, 0.952, TITLE, fontsize=18, weight="bold", color=INK)
    figure.text(0.035, 0.93, fill(subtitle(metrics), 190), fontsize=9.5, color=MUTED, va="top")
    for row, (value, meaning) in enumerate(headline(metrics)):
        figure.text(0.035, 0.84 - 0.055 * row, value, fontsize=19, weight="bold", color=INK, va="top")
        figure.text(0.145, 0.831 - 0.055 * row, meaning, fontsize=11, color=MUTED, va="top")
    draw_bars(figure.add_axes((0.4, 0.56, 0.57, 0.29)), metrics)
    figure.text(0.035, 0.475, "A random sample of the test questions", fontsize=12, weight="bold", color=INK)
    legend = "green: the model's answer, and right      red: the model's, and wrong"
    figure.text(0.965, 0.475, legend, fontsize=9.5, color=MUTED, ha="right")
    grid = figure.add_gridspec(
        GRID_ROWS, GRID_COLUMNS, left=0.035, right=0.965, top=0.455, bottom=0.1, wspace=0.35, hspace=0.5
    )
    for cell, question in enumerate(sample(questions, GRID_COLUMNS * GRID_ROWS)):
        draw_question(figure.add_subplot(grid[cell // GRID_COLUMNS, cell % GRID_COLUMNS]), question)
    figure.text(0.035, 0.016, ATTRIBUTION, fontsize=7.5, color=MUTED)
    with renamed_when_whole(path) as temporary:
        figure.savefig(temporary, format="png")


def sample(questions: list[Any], count: int) -> list[Any]:
    """At most `count` of the questions, always the same ones."""
    return random.Random(SAMPLE_SEED).sample(questions, min(count, len(questions)))


def chart_png(metrics: dict[str, Any]) -> bytes:
    """The bars alone."""
    figure = new_figure(9, 3.8)
    draw_bars(figure.add_axes((0.08, 0.15, 0.9, 0.74)), metrics)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def question_html(question: Any) -> str:
    """One picture with question and answers; all are text from outside and are escaped."""
    kind = "right" if question.right else "wrong"
    answer, truth = map(escape, answer_texts(question))
    caption = f'{escape(question.question)}<br><span class="{kind}">{answer}</span> <span class="truth">{truth}</span>'
    picture = pages.picture(question.picture.read_bytes())
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def write_html(path: Path, metrics: dict[str, Any], questions: list[Any]) -> None:
    """The whole report: figures, accuracy by type, samples of wrong and right answers, environment, attribution.

    Args:
        path (`Path`): the page; it appears whole or not at all.
        metrics (`dict`): content of `metrics.json`.
        questions (`list[Question]`): answered test questions.
    """
    wrong, right = ([q for q in questions if q.right is outcome] for outcome in (False, True))
    chart = pages.picture(chart_png(metrics), alt="accuracy by type of question")
    body = (
        f'<h1>{escape(TITLE)}</h1><p class="note">{escape(subtitle(metrics))}</p>',
        pages.figures(headline(metrics)),
        f"<h2>Accuracy by type of question</h2>{chart}",
        f"<h2>Wrong answers ({len(wrong):,})</h2>",
        f'<div class="grid">{"".join(map(question_html, sample(wrong, MOST_SHOWN)))}</div>',
        f"<h2>Right answers ({len(right):,})</h2>",
        f'<div class="grid">{"".join(map(question_html, sample(right, MOST_SHOWN)))}</div>',
        report_pages.machine(metrics),
        f"<footer><p>Of each kind {MOST_SHOWN} are shown at most, drawn at random. {escape(ATTRIBUTION)}</p></footer>",
    )
    pages.write_page(path, pages.page(TITLE, "\n".join(body), report_pages.STYLE))
