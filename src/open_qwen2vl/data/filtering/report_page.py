"""The report as one HTML page: counts, histograms and examples.

Text that comes from the data is escaped, pictures are embedded, nothing is loaded from elsewhere (the page forbids it
itself), and the same selection gives the same bytes.
"""

import math
import re
from collections.abc import Sequence

from ... import pages
from ...pages import escape
from .balance import Tail
from .examples import Content, Example
from .histograms import Histogram
from .matching import Matching
from .report import ClauseCounts, SelectionReport, matching_line

_WIDTH, _HEIGHT, _MARGIN = 480, 150, 22  # of a histogram; the margin holds the numbers below it
_CAPTION_CHARACTERS = 300

_STYLE = """
:root { --kept: #1a7f4b; --dropped: #aab2bd; --mark: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --kept: #57c492; --dropped: #4a5564; --mark: #ff9a90; } }
.expression { display: block; background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: .7rem 1rem; margin: 1rem 0; }
th { color: var(--muted); font-size: .85rem; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { width: 40%; } td.bar i { display: block; height: 12px; border-radius: 3px; background: var(--kept); }
td.share { white-space: nowrap; width: 15%; font-variant-numeric: tabular-nums; font-size: .8rem; }
td.share i { display: block; height: 8px; border-radius: 3px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); gap: 1.4rem; }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px system-ui, sans-serif; fill: var(--muted); }
figure { border-top-width: 4px; }
figure.kept { border-top-color: var(--kept); } figure.dropped { border-top-color: var(--mark); }
.picture { height: 140px; display: flex; gap: 4px; align-items: center; justify-content: center;
  background: var(--track); border-radius: 6px; color: var(--muted); font-size: .8rem; margin-bottom: .5rem;
  overflow: hidden; }
.picture img { max-width: 100%; max-height: 140px; min-width: 0; } .picture:has(.twin) img { max-height: 80px; }
.twin { border-left: 2px dashed var(--mark); padding-left: 4px; display: flex; align-items: center; }
figcaption p { margin: 0 0 .4rem; }
.reason, figcaption td { font-size: .74rem; line-height: 1.35; overflow-wrap: break-word; }
.kept .reason { color: var(--kept); } .dropped .reason { color: var(--mark); }
figcaption td { padding: 0; border: 0; color: var(--muted); vertical-align: top; }
figcaption td + td { text-align: right; padding-left: .5rem; white-space: nowrap; }
p.where { color: var(--muted); font-size: .66rem; margin: .4rem 0 0; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 1em; }
.key i.line { width: 0; border-left: 2px dashed var(--mark); border-radius: 0; vertical-align: -.1em; }
.key i.k { background: var(--kept); } .key i.d { background: var(--dropped); }
"""


def report_page(report: SelectionReport, histograms: Sequence[Histogram], examples: Sequence[Example]) -> str:
    """The counts, a histogram for each score, and kept and dropped pairs, as HTML."""
    funnel_head = '<tr><th>pairs that pass</th><th></th><th class="n">left</th><th class="n">dropped here</th></tr>'
    clause_head = '<tr><th>clause</th><th class="n">true</th><th class="n">false</th><th class="n">no score</th></tr>'
    body = (
        "<h1>Which pairs were kept, and why</h1>",
        f'<code class="expression">{escape(report.expression)}</code>',
        pages.figures(_figures(report)),
        f"<h2>Step by step</h2><table>{funnel_head}{_funnel(report)}</table>",
        f"<h2>Each clause alone</h2><table>{clause_head}{''.join(map(_clause, report.clauses))}</table>",
        *(f'<p class="note">{escape(note)}</p>' for note in _notes(report)),
        *map(_tail, report.tails),
        _types(report.matching),
        _plots(histograms),
        _examples(report, examples),
    )
    return pages.page(f"Filter: {report.kept:,} of {report.pairs:,} pairs kept", "\n".join(body), _STYLE)


def _figures(report: SelectionReport) -> list[tuple[str, str]]:
    figures = [
        (f"{report.kept:,}", "pairs kept"),
        (_percent(report.kept, report.pairs), f"of {report.pairs:,}"),
        (f"{report.pairs - report.kept:,}", "dropped"),
    ]
    return figures + ([] if report.duplicates is None else [(f"{report.duplicates:,}", "of them duplicates")])


def _funnel(report: SelectionReport) -> str:
    """A row for each step with what is left behind it."""
    left, rows = report.pairs, [("all pairs", report.pairs, "")]
    steps = report.steps + ([] if report.duplicates is None else [("no duplicate", report.duplicates)])
    steps += [("drawn by task type", report.not_drawn)] if report.matching is not None else []
    for text, dropped in steps:
        left -= dropped
        rows.append((f"<code>{escape(text)}</code>", left, f"{dropped:,}"))
    return "".join(
        f'<tr><td>{text}</td><td class="bar"><i style="width:{100 * left / max(1, report.pairs):.2f}%"></i></td>'
        f'<td class="n">{left:,}</td><td class="n">{dropped}</td></tr>'
        for text, left, dropped in rows
    )


def _notes(report: SelectionReport) -> list[str]:
    notes = [
        f"Uids of {path} that no score file names, and that were not looked at: {count:,}."
        for path, count in report.unscored.items()
        if count
    ]
    for name, reasons in report.no_score.items():
        if reasons:
            why = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
            notes.append(f"Pairs without {name}: {why}.")
    if report.without_hash:
        notes.append(
            f"Pairs without an image hash or embedding, which count as no duplicates: {report.without_hash:,}."
        )
    notes += [f"{name.capitalize()}: {text}." for name, text in report.training_lines()]
    if report.not_uids:
        notes.append(f"Rows of the result of --sql left out, which are no uid: {report.not_uids:,}.")
    if report.bad_uids:
        notes.append(f"Rows of the score files left out, their uid is not 32 hex digits: {report.bad_uids:,}.")
    return notes


def _clause(clause: ClauseCounts) -> str:
    numbers = (clause.true, clause.false, clause.no_score)
    cells = "".join(f'<td class="n">{number:,}</td>' for number in numbers)
    return f"<tr><td><code>{escape(clause.text)}</code></td>{cells}</tr>"


def _plots(histograms: Sequence[Histogram]) -> str:
    if not histograms:
        return ""
    key = '<i class="k"></i>kept<i class="d"></i>dropped'
    key += '<i class="line"></i>threshold'
    plots = "".join(f"<div><b>{escape(plot.name)}</b>{_plot(plot)}</div>" for plot in histograms)
    return f'<h2>Scores <span class="hint key">{key}</span></h2><div class="plots">{plots}</div>'


def _plot(plot: Histogram) -> str:
    """Stacked bars with the thresholds as lines; the last bars hold all that lies beyond."""
    highest = max(1, *(kept + dropped for kept, dropped in zip(plot.kept, plot.dropped, strict=True)))
    bars = len(plot.kept)
    width, base = _WIDTH / bars, _HEIGHT - _MARGIN
    parts = []
    for bar, (kept, dropped) in enumerate(zip(plot.kept, plot.dropped, strict=True)):
        low, high = plot.low + bar * plot.width, plot.low + (bar + 1) * plot.width
        tall, taller = (count / highest * (base - 14) for count in (kept, kept + dropped))
        if kept + dropped:
            parts.append(
                f"<g><title>{low:.4g} to {high:.4g}: {kept:,} kept, {dropped:,} dropped</title>"
                f"{_bar(bar * width, base - taller, width, taller - tall, 'dropped')}"
                f"{_bar(bar * width, base - tall, width, tall, 'kept')}</g>"
            )
    parts.append(f'<line x1="0" x2="{_WIDTH}" y1="{base}" y2="{base}" stroke="var(--line)"/>')
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        value = plot.low + share * bars * plot.width
        parts.append(f'<text x="{share * _WIDTH:.0f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{value:.4g}</text>')
    parts.append(f'<text x="{_WIDTH}" y="10" text-anchor="end">highest bar: {highest:,}</text>')
    for text, value in plot.marks:
        x = min(max((value - plot.low) / plot.width * width, 1), _WIDTH - 1)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="{base}" stroke="var(--mark)" stroke-dasharray="4 3">'
            f"<title>{escape(text)}: {value:.6g}</title></line>"
        )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _tail(tail: Tail) -> str:
    """The pairs of each concept, the commonest first, before and after: both axes logarithmic; and the commonest."""
    highest, ranks = math.log(max(2, *tail.before)), math.log(max(2, len(tail.before)))

    def line(counts: Sequence[int], kind: str) -> str:
        shown = [(math.log(rank) / ranks, math.log(count) / highest) for rank, count in enumerate(counts, 1) if count]
        base = _HEIGHT - _MARGIN
        points = " ".join(f"{x * _WIDTH:.1f},{base - y * (base - 14):.1f}" for x, y in shown)
        return f'<polyline points="{points}" fill="none" stroke="var(--{kind})" stroke-width="2"/>'

    head = '<tr><th>concept</th><th class="n">pairs before</th><th class="n">after</th></tr>'
    rows = (
        f'<tr><td>{escape(name)}</td><td class="n">{before:,}</td><td class="n">{after:,}</td></tr>'
        for name, before, after in tail.heads
    )
    note = (
        f"{len(tail.before):,} concepts, the commonest first: 1 to {max(tail.before, default=0):,} pairs, logarithmic"
    )
    plot = f"{line(tail.before, 'dropped')}{line(tail.after, 'kept')}"
    key = '<span class="hint key"><i class="d"></i>before<i class="k"></i>after</span>'
    return (
        f"<h2>The long tail of <code>{escape(tail.text)}</code> {key}</h2>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" style="max-width:{_WIDTH}px">{plot}</svg>'
        f'<p class="note">{note}</p><table>{head}{"".join(rows)}</table>'
    )


def _types(matching: Matching | None) -> str:
    """The task types, the commonest of the reference first: shares of the reference, before and after."""
    if matching is None:
        return ""
    totals = [sum(getattr(one, name) for one in matching.types) for name in ("reference", "before", "after")]
    highest = max(
        count / max(1, total)
        for one in matching.types
        for count, total in zip((one.reference, one.before, one.after), totals, strict=True)
    )

    def cell(count: int, total: int, kind: str) -> str:
        share = count / max(1, total)
        bar = f'<i style="width:{100 * share / max(highest, 1e-9):.1f}%;background:var(--{kind})"></i>'
        return f'<td class="share">{bar}{share:.1%} ({count:,})</td>'

    rows = "".join(
        f"<tr><td>{number}</td><td>{escape(one.example)}</td>{cell(one.reference, totals[0], 'mark')}"
        f"{cell(one.before, totals[1], 'dropped')}{cell(one.after, totals[2], 'kept')}"
        f'<td class="n">{max(0, one.wanted - one.after) or ""}</td></tr>'
        for number, one in enumerate(matching.types)
    )
    head = "<tr><th></th><th>typical</th><th>reference</th><th>before</th><th>after</th><th>wanting</th></tr>"
    note = escape(f"Task types: {matching_line(matching)}.")
    return f'<h2>Task types</h2><p class="note">{note}</p><table>{head}{rows}</table>'


def _bar(x: float, y: float, width: float, height: float, kind: str) -> str:
    if not height:
        return ""
    box = f'x="{x + 0.5:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height:.1f}"'
    return f'<rect {box} fill="var(--{kind})"/>'


def _examples(report: SelectionReport, examples: Sequence[Example]) -> str:
    """The kept pairs, then those that were dropped, by step."""
    kept = len(report.steps)
    parts = {kept: (f"Kept: {report.kept:,} pairs", report.kept)}
    parts |= {n: (f"Dropped by {text}: {count:,} pairs", count) for n, (text, count) in enumerate(report.steps)}
    if report.duplicates is not None:
        parts[kept + 1] = (f"Dropped as duplicates: {report.duplicates:,} pairs", report.duplicates)
    if report.matching is not None:
        parts[kept + 2] = (f"Not drawn: {report.not_drawn:,} pairs", report.not_drawn)
    sections = []
    for step, (title, count) in parts.items():
        shown = [example for example in examples if example.step == step]
        if shown:
            hint = f"{len(shown)} of them, drawn at random" if len(shown) < count else "all of them"
            cards = "".join(_example(example, step == kept) for example in shown)
            sections.append(
                f'<h2>{escape(title)} <span class="hint">{hint}</span></h2><div class="grid">{cards}</div>'
            )
    return "".join(sections)


def _example(example: Example, kept: bool) -> str:
    pictures = _picture(example.content)
    if example.twin is not None:
        pictures += f'<span class="twin">{_picture(example.twin)}</span>'
    caption = example.content.caption
    if len(caption) > _CAPTION_CHARACTERS:
        caption = caption[:_CAPTION_CHARACTERS] + " \u2026"
    where = f"{example.tar}/{example.key or ''}"
    reason = "<br>".join(_breakable(part) for part in example.reason.split("; "))
    scores = ((name, "\u2013" if value is None else f"{value:.4g}") for name, value in example.scores.items())
    rows = "".join(f"<tr><td>{_breakable(name)}</td><td>{value}</td></tr>" for name, value in scores)
    return (
        f'<figure class="{"kept" if kept else "dropped"}"><div class="picture">{pictures}</div><figcaption>'
        f'<p>{escape(caption)}</p><p class="reason">{reason}</p><table>{rows}</table>'
        f'<p class="where">{escape(where)}<br>{escape(example.uid)}</p>'
        "</figcaption></figure>"
    )


def _breakable(text: str) -> str:
    """The text with places where a line may end, so that long names of scores do not break within a word."""
    return re.sub(r"([._/])(?=[A-Za-z])", r"\1<wbr>", escape(text))


def _picture(content: Content) -> str:
    if content.picture is None:
        return escape(content.problem)
    return pages.picture(content.picture, "jpeg")


def _percent(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"
