"""What a search found: lines for the terminal, `report.json`, and a page with the weights, the fit and the check."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .. import pages
from ..files import write_json
from ..pages import escape, write_page
from .fitting import Fit, Proposal

_STYLE = """
td, th { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; }
.bar { position: relative; height: .9rem; min-width: 12rem; background: var(--track); border-radius: 4px; }
.bar i { position: absolute; top: 0; bottom: 0; background: var(--accent); border-radius: 4px; }
.bar i.range { background: var(--ink); opacity: .35; }
img { max-width: 100%; border-radius: 12px; }
"""


@dataclass
class MixReport:
    """A search.

    Attributes:
        sources (`list[str]`): names.
        domains (`tuple[str, ...]`): held out, names.
        target (`np.ndarray`): `(domains,)`, how much each counts.
        own (`np.ndarray`): `(sources,)`, weights of SOURCES.yaml, mean of the prior.
        mixtures (`np.ndarray`): `(mixtures, sources)` that were trained.
        losses (`np.ndarray`): `(mixtures, domains)`, nats per label.
        failed (`int`): mixtures whose training stopped.
        fits (`list[Fit]`): of each domain.
        proposal ([`Proposal`]): what was found.
        checked (`dict[str, list[float]]`): the target's loss of named mixtures as trained, of each seed.
    """

    sources: list[str]
    domains: tuple[str, ...]
    target: np.ndarray
    own: np.ndarray
    mixtures: np.ndarray
    losses: np.ndarray
    failed: int
    fits: list[Fit]
    proposal: Proposal
    checked: dict[str, list[float]]

    def __str__(self) -> str:
        lines = [f"proxies    {len(self.mixtures):,}" + (f", {self.failed:,} failed" if self.failed else "")]
        for domain, fit in zip(self.domains, self.fits, strict=True):
            lines.append(f"fit        {domain}: {_fit_text(fit)}")
        for name, weight, low, high in self._weights():
            lines.append(f"weight     {name}: {weight:.3f} ({low:.3f} to {high:.3f})")
        for name, (mean, low, high) in self.proposal.losses.items():
            lines.append(f"loss       {name}: {mean:.4f} foretold ({low:.4f} to {high:.4f}){self._measured(name)}")
        return "\n".join(lines)

    def _weights(self) -> Iterator[tuple[str, float, float, float]]:
        return zip(self.sources, self.proposal.weights, *self.proposal.interval, strict=True)

    def _measured(self, name: str) -> str:
        values = self.checked.get(name)
        if not values:
            return ""
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        return f", {np.mean(values):.4f}{spread} trained ({len(values)} seeds)"

    def as_json(self) -> dict[str, Any]:
        """All of it in numbers."""
        return {
            "weights": {
                name: {"weight": weight, "low": low, "high": high} for name, weight, low, high in self._weights()
            },
            "target": dict(zip(self.domains, self.target.tolist(), strict=True)),
            "fits": {
                domain: {"form": fit.form, "errors": fit.errors, "spread": fit.spread, "rank": fit.rank}
                for domain, fit in zip(self.domains, self.fits, strict=True)
            },
            "foretold": {
                name: dict(zip(("loss", "low", "high"), values, strict=True))
                for name, values in self.proposal.losses.items()
            },
            "trained": self.checked,
            "proxies": [
                {
                    "weights": dict(zip(self.sources, weights, strict=True)),
                    "losses": dict(zip(self.domains, losses, strict=True)),
                }
                for weights, losses in zip(self.mixtures.tolist(), self.losses.tolist(), strict=True)
            ],
            "failed": self.failed,
        }


def _fit_text(fit: Fit) -> str:
    return (
        f"{fit.form}, off by {fit.errors[fit.form]:.4f} on left-out proxies (a constant by {fit.spread:.4f}), rank "
        f"correlation {fit.rank:.2f}"
    )


def write_report(output: Path, report: MixReport) -> None:
    """Write `report.json` and `report.html`."""
    write_json(output / "report.json", report.as_json(), default=float)
    write_page(output / "report.html", _page(report))


def _page(report: MixReport) -> str:
    proposal = report.proposal
    best, low, high = proposal.losses["proposal"]
    like, *_ = proposal.losses["all alike"]
    body = [
        "<h1>A mixture, by small proxies</h1>",
        pages.figures(
            [
                (
                    f"{len(report.mixtures):,}",
                    "mixtures trained" + f", {report.failed:,} failed" * bool(report.failed),
                ),
                (f"{best:.4f}", f"held-out loss foretold for the proposal ({low:.4f} to {high:.4f})"),
                (f"{like - best:+.4f}", "nats per label gained on all sources alike, foretold"),
            ]
        ),
        "<h2>Weights</h2>",
        _weights_table(report),
        '<p class="note">The mean of the best mixtures of 100 fits on resampled proxies; the range is what nine of '
        "ten of these fits say.</p>",
        f"<h2>Held-out loss ({escape(_target_text(report))})</h2>",
        _losses_table(report),
        "<h2>How well the fit foretells proxies that it does not know</h2>",
        _fits_table(report),
        pages.picture(_scatter(report), alt="measured and foretold losses"),
        "<h2>Proxies</h2>",
        _proxies_table(report),
    ]
    return pages.page("Mixture", "\n".join(body), _STYLE)


def _target_text(report: MixReport) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in zip(report.domains, report.target, strict=True))


def _weights_table(report: MixReport) -> str:
    rows = []
    for (name, weight, low, high), own in zip(report._weights(), report.own, strict=True):
        bar = (
            f'<div class="bar"><i style="left:0;width:{weight:.1%}"></i>'
            f'<i class="range" style="left:{low:.1%};width:{max(high - low, 0.002):.1%}"></i></div>'
        )
        rows.append((escape(name), f"{own:.3f}", f"<b>{weight:.3f}</b>", f"{low:.3f} to {high:.3f}", bar))
    return _table(("source", "SOURCES.yaml", "proposed", "range", ""), rows)


def _losses_table(report: MixReport) -> str:
    rows = [
        (
            escape(name),
            f"{mean:.4f}",
            f"{low:.4f} to {high:.4f}",
            escape(report._measured(name).lstrip(", ") or "not trained"),
        )
        for name, (mean, low, high) in report.proposal.losses.items()
    ]
    return _table(("mixture", "foretold", "range", "trained (--check-seeds)"), rows)


def _fits_table(report: MixReport) -> str:
    rows = [
        (
            escape(name),
            fit.form,
            *(f"{error:.4f}" for error in fit.errors.values()),
            f"{fit.spread:.4f}",
            f"{fit.rank:.2f}",
        )
        for name, fit in zip(report.domains, report.fits, strict=True)
    ]
    forms = (f"off by: {form}" for form in report.fits[0].errors)
    return _table(("domain", "form taken", *forms, "a constant", "rank correlation"), rows)


def _proxies_table(report: MixReport) -> str:
    order = np.argsort(report.losses @ report.target, kind="stable")
    rows = [(*(f"{w:.3f}" for w in report.mixtures[i]), *(f"{loss:.4f}" for loss in report.losses[i])) for i in order]
    return _table([*map(escape, report.sources), *(f"loss: {escape(name)}" for name in report.domains)], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML, in which all text from data is escaped."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head), *("".join(f"<td>{c}</td>" for c in row) for row in rows)]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _scatter(report: MixReport) -> bytes:
    columns = len(report.domains)
    figure = Figure(figsize=(min(4 * columns, 16), 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis, name, fit, losses in zip(axes, report.domains, report.fits, report.losses.T, strict=True):
        axis.plot(losses, fit.predicted, "o", markersize=4)
        ends = [min(losses.min(), fit.predicted.min()), max(losses.max(), fit.predicted.max())]
        axis.plot(ends, ends, color="gray", linewidth=1)
        # A dollar sign would be read as mathematics.
        axis.set(title=name.replace("$", r"\$"), xlabel="trained, nats per label", ylabel="foretold")
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Software": None})
    return buffer.getvalue()
