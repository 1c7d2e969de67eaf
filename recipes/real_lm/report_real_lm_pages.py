"""How the results look: one self-contained HTML page.

Text that comes from data or from the model is escaped, pictures are embedded, and nothing is loaded from elsewhere.
"""

import sys
from pathlib import Path
from typing import Any

from open_qwen2vl import pages
from open_qwen2vl.pages import escape

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from report_pages import ATTRIBUTION, STYLE, curve_png, example_html, machine  # noqa: E402

TITLE = "A pre-trained language model learns to see"
ARMS = {
    "align": "align: projector alone",
    "full": "full, a quarter of it text",
    "full_without_text": "full, captions alone",
}
PHOTOGRAPHS = (
    "Photographs: scikit-image's pictures (CC0 or public domain), Grace Hopper (public domain, matplotlib), china.jpg "
    "by danielbuechele and flower.jpg by vultilion (CC BY 2.0, scikit-learn). Language model: SmolLM2-135M-Instruct, "
    "Apache-2.0."
)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of texts."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def span(interval: list[float], digits: int = 2) -> str:
    """An interval in brackets."""
    return f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def captions_table(arms: dict[str, Any], kind: str) -> str:
    """Captions of one kind of pictures, a row for each training."""
    rows = []
    for arm, title in ARMS.items():
        found = arms[arm]["captions"][kind]
        share = f"{found['exact_match']:.3f} {span(found['exact_match_interval'])}"
        right = f"{share}, {found['right']} of {found['pictures']}"
        gain = f"{found['gain']:.2f} {span(found['gain_interval'])}"
        rows.append(
            (
                title,
                right,
                f"{found['blanked_exact_match']:.3f}",
                f"{found['loss']:.2f}",
                f"{found['blanked_loss']:.2f}",
                gain,
            )
        )
    return table(
        (
            "training",
            "right to the letter",
            "grey",
            "nats a token",
            "grey",
            "nats that a picture is worth to its caption",
        ),
        rows,
    )


def texts_table(metrics: dict[str, Any]) -> str:
    """Perplexity before and after, a row for each training."""
    rows = [("SmolLM2 as it was", *(f"{value:.2f}" for value in metrics["before"].values()))]
    for arm, title in ARMS.items():
        found = metrics["arms"][arm]["texts"].values()
        cells = (
            f"{one['perplexity']:.2f}, times {one['ratio']:.3f} {span(one['ratio_interval'], 3)}" for one in found
        )
        rows.append((title, *cells))
    return table(("perplexity", "Python's reference (other topics are trained on)", "scikit-learn's data sets"), rows)


def write_html(path: Path, metrics: dict[str, Any], histories: dict[str, list[dict]], seen: dict[str, list]) -> None:
    """The whole report.

    Args:
        path (`Path`): the page; it appears whole or not at all.
        metrics (`dict`): content of `metrics.json`.
        histories (`dict[str, list[dict]]`): the trainer's log history of each training.
        seen (`dict[str, list[Example]]`): captioned held-out pictures of the training `full`, by kind.
    """
    arms, corpus = metrics["arms"], metrics["corpus"]
    best = arms["full"]["captions"]
    note = (
        f"SmolLM2-135M and a small vision tower. {corpus['emoji']['train']} drawings and {corpus['photos']['train']} "
        f"tiles of photographs for training, {corpus['emoji']['held_out']} and {corpus['photos']['held_out']} held "
        "out. Brackets are 95 % intervals over pictures or windows of text; one seed."
    )
    curves = "".join(
        f"<h3>{escape(title)}</h3>{pages.picture(curve_png(histories[arm]), alt='loss by step')}"
        for arm, title in ARMS.items()
    )
    headline = [
        (f"{best['emoji']['exact_match']:.1%}", "of held-out drawings named to the letter"),
        (f"{best['photos']['exact_match']:.1%}", "of held-out tiles of photographs"),
        (f"x {arms['full']['texts']['other']['ratio']:.2f}", "perplexity of other text, with text in the mixture"),
        (f"x {arms['full_without_text']['texts']['other']['ratio']:.2f}", "the same without"),
    ]
    shown = "".join(
        f'<h2>Held-out {name}</h2>{captions_table(arms, kind)}<div class="grid">'
        f"{''.join(map(example_html, seen[kind]))}</div>"
        for kind, name in (("emoji", "drawings"), ("photos", "tiles of photographs"))
    )
    body = (
        f'<h1>{escape(TITLE)}</h1><p class="note">{escape(note)}</p>',
        pages.figures(headline),
        f"<h2>What the language model forgot</h2>{texts_table(metrics)}",
        shown,
        f"<h2>Training loss</h2>{curves}",
        machine(metrics),
        f"<footer><p>{escape(ATTRIBUTION)}</p><p>{escape(PHOTOGRAPHS)}</p></footer>",
    )
    pages.write_page(path, pages.page(TITLE, "\n".join(body), STYLE))
