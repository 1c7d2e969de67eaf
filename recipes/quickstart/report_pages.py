"""How the quickstart's results look: one self-contained HTML page and one picture.

Text that comes from data or from the model is escaped, pictures are embedded, and nothing is loaded from elsewhere.
"""

import io
import random
from pathlib import Path
from textwrap import fill, wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from open_qwen2vl import pages
from open_qwen2vl.files import renamed_when_whole
from open_qwen2vl.pages import escape
from open_qwen2vl.processing.images import decode_image

ATTRIBUTION = (
    "Emoji drawings: OpenMoji (https://openmoji.org), the open-source emoji and icon project. License: CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/). Rendered to PNG; names from Unicode CLDR."
)
TITLE = "A small Open-Qwen2VL, pre-trained from scratch on emoji"
RIGHT, WRONG, INK, MUTED = "#1a7f4b", "#c0392b", "#22272e", "#6b7480"
GRID_COLUMNS, GRID_ROWS, SAMPLE_SEED = 8, 3, 1

STYLE = """
.grid { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
figure { text-align: center; } figure img { width: 96px; height: 96px; } img { max-width: 100%; }
td { padding: .1rem 1.2rem .1rem 0; vertical-align: top; } table { width: auto; }
"""


def headline(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that stand on top of both reports, as (value, what it is)."""
    return [
        (f"{metrics['held_out_exact_match']:.1%}", "held-out exact match"),
        (f"{metrics['blanked_exact_match']:.1%}", "the same with grey images"),
        (f"{metrics['train_seconds'] / 60:.1f} min", f"training, {metrics['steps']:,} steps"),
        (f"{metrics['tokens_per_second']:,.0f}", "tokens per second"),
        (f"{metrics['fill']:.2%}", "of the packs filled"),
    ]


def subtitle(metrics: dict[str, Any]) -> str:
    """One sentence on what was trained on what."""
    return (
        f"{metrics['parameters'] / 1e6:.1f}M parameters, randomly initialised; {metrics['train_images']:,} captioned "
        f"pictures, {metrics['held_out_images']} held out: emoji that the model knows, in a skin tone that it never "
        f"saw them in. A caption counts only if it is right to the letter. Of those that are not, "
        f"{metrics['wrong_tone']} name the right emoji in a wrong tone."
    )


def draw_loss(axes: Axes, history: list[dict[str, float]]) -> None:
    """The loss by step, as logged and as a moving average that does not lag behind."""
    logs = [log for log in history if "loss" in log]
    steps, losses = (np.array([log[name] for log in logs]) for name in ("step", "loss"))
    half = len(logs) // 120
    window = 2 * half + 1
    averages = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    axes.plot(steps, losses, color="#3b6fb6", alpha=0.3, linewidth=1)
    axes.plot(steps[half : len(steps) - half], averages, color="#3b6fb6", linewidth=2)
    axes.set_xlabel("step", color=MUTED)
    axes.set_ylabel("loss (nats per token)", color=MUTED)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2)
    axes.tick_params(colors=MUTED)
    axes.spines[["top", "right"]].set_visible(False)


def draw_example(axes: Axes, example: Any) -> None:
    """A picture, below it its true caption, and below that what the model said."""
    axes.imshow(np.asarray(decode_image(example.png)))
    axes.set_xticks([])
    axes.set_yticks([])
    color = RIGHT if example.right else WRONG
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=1.5)
    below = -4
    for text, ink in ((example.caption, MUTED), (example.generated or "(nothing)", color)):
        lines = wrap(text, 27, break_on_hyphens=False)[:3]
        # A dollar sign would start a formula.
        label = "\n".join(lines).replace("$", r"\$")
        axes.annotate(
            label, (0.5, 0), (0, below), "axes fraction", "offset points", ha="center", va="top", fontsize=7, color=ink
        )
        below -= 9.2 * len(lines) + 2


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs neither a display nor pyplot's global state."""
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def write_png(path: Path, metrics: dict[str, Any], history: list[dict[str, float]], examples: list[Any]) -> None:
    """One picture: figures, loss curve, and a random sample of the held-out pictures with the model's captions.

    Args:
        path (`Path`): the PNG; it appears whole or not at all.
        metrics (`dict`): content of `metrics.json`.
        history (`list[dict]`): the trainer's log history.
        examples (`list[Example]`): captioned held-out pictures.
    """
    figure = new_figure(14, 10.8)
    figure.text(0.035, 0.962, TITLE, fontsize=18, weight="bold", color=INK)
    figure.text(0.035, 0.942, fill(subtitle(metrics), 175), fontsize=9.5, color=MUTED, va="top")
    for row, (value, meaning) in enumerate(headline(metrics)):
        figure.text(0.035, 0.865 - 0.044 * row, value, fontsize=19, weight="bold", color=INK, va="top")
        figure.text(0.145, 0.858 - 0.044 * row, meaning, fontsize=11, color=MUTED, va="top")
    draw_loss(figure.add_axes((0.37, 0.68, 0.6, 0.195)), history)

    figure.text(0.035, 0.612, "A random sample of the held-out pictures", fontsize=12, weight="bold", color=INK)
    legend = "grey: the true caption      green: the model's, and right      red: the model's, and wrong"
    figure.text(0.965, 0.612, legend, fontsize=9.5, color=MUTED, ha="right")
    count = min(GRID_COLUMNS * GRID_ROWS, len(examples))
    grid = figure.add_gridspec(
        GRID_ROWS, GRID_COLUMNS, left=0.035, right=0.965, top=0.59, bottom=0.11, wspace=0.35, hspace=0.78
    )
    for cell, example in enumerate(random.Random(SAMPLE_SEED).sample(examples, count)):
        draw_example(figure.add_subplot(grid[cell // GRID_COLUMNS, cell % GRID_COLUMNS]), example)
    figure.text(0.035, 0.016, ATTRIBUTION, fontsize=7.5, color=MUTED)
    with renamed_when_whole(path) as temporary:
        figure.savefig(temporary, format="png")


def curve_png(history: list[dict[str, float]]) -> bytes:
    """The loss curve alone."""
    figure = new_figure(9, 3.6)
    draw_loss(figure.add_axes((0.08, 0.15, 0.9, 0.8)), history)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def example_html(example: Any) -> str:
    """One picture with its captions; both are text from outside and are escaped."""
    kind = "right" if example.right else "wrong"
    truth, generated = escape(example.caption), escape(example.generated or "(nothing)")
    captions = f'<span class="truth">{truth}</span><br><span class="{kind}">{generated}</span>'
    return f"<figure>{pages.picture(example.png)}<figcaption>{captions}</figcaption></figure>"


def machine(metrics: dict[str, Any]) -> str:
    """Where and with what, as a table."""
    return (
        f"<h2>Where and with what</h2><table>{pages.rows((metrics['machine'] | metrics['versions']).items())}</table>"
    )


def write_html(path: Path, metrics: dict[str, Any], history: list[dict[str, float]], examples: list[Any]) -> None:
    """The whole report: figures, loss curve, every held-out picture, environment, attribution.

    Args:
        path (`Path`): the page; it appears whole or not at all.
        metrics (`dict`): content of `metrics.json`.
        history (`list[dict]`): the trainer's log history.
        examples (`list[Example]`): captioned held-out pictures.
    """
    wrong, right = ([e for e in examples if e.right is outcome] for outcome in (False, True))
    body = (
        f'<h1>{escape(TITLE)}</h1><p class="note">{escape(subtitle(metrics))}</p>',
        pages.figures(headline(metrics)),
        f"<h2>Training loss</h2>{pages.picture(curve_png(history), alt='loss by step')}",
        f"<h2>Held-out pictures that the model names wrongly ({len(wrong)})</h2>",
        f'<div class="grid">{"".join(map(example_html, wrong))}</div>',
        f"<h2>Held-out pictures that it names rightly ({len(right)})</h2>",
        f'<div class="grid">{"".join(map(example_html, right))}</div>',
        machine(metrics),
        f"<footer><p>{escape(ATTRIBUTION)}</p></footer>",
    )
    pages.write_page(path, pages.page(TITLE, "\n".join(body), STYLE))
