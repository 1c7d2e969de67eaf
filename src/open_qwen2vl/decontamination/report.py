"""What a decontamination found, and how well it finds what it looks for."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from .. import pages
from ..data.engine.engine import StepReport
from ..files import write_json
from ..pages import escape, write_page
from ..places import Place, arrow_source
from .attacks import AttackCounts
from .embeddings import LIMIT as EMBEDDED
from .index import LIMITS

_LIMITS = {**LIMITS, "embedding": EMBEDDED}
_SHOWN = 5  # pairs of evaluation pictures that are taken for each other


@dataclass
class DecontaminationReport:
    """Figures of a decontamination.

    Attributes:
        step ([`StepReport`]): samples of this run.
        contents (`dict`): pictures, texts and what was left out by reason, with an example, by set.
        texts_left_out (`dict[str, int]`): texts of the sets that are not looked for, by reason.
        attacks (`list[AttackCounts]`): the self-test, by kind of change.
        embedded (`list[AttackCounts]`): the same by embeddings; empty without them.
        compared (`int`): evaluation pictures that took part in the self-test.
        alike (`list`): pairs of entries (set and name) whose unchanged pictures are taken for each other.
        found (`dict[str, dict[str, int]]`): samples of the pool from each limit on, by set: images, texts, embeddings.
    """

    step: StepReport
    contents: dict[str, dict[str, Any]]
    texts_left_out: dict[str, int]
    attacks: list[AttackCounts]
    embedded: list[AttackCounts]
    compared: int
    alike: list[tuple[list[str], list[str]]]
    found: dict[str, dict[str, int]]

    def __str__(self) -> str:
        lines = [str(self.step)]
        for name, counts in self.contents.items():
            lines.append(f"set        {name}: {counts['pictures']:,} pictures, {counts['texts']:,} texts")
            lines += [f"           {reason} {count:,} ({why})" for reason, count, why in _skipped(counts)]
        lines += [f"no n-gram  {count:,} texts: {reason}" for reason, count in self.texts_left_out.items()]
        if self.compared:
            lines.append(f"self-test  of {self.compared:,} pictures, recall and precision:")
            lines += [f"           {one.kind:<32}{one.recall:7.1%} {one.precision:7.1%}" for one in self.attacks]
            if self.embedded:
                lines.append(f"embedded   the same, by a cosine of {EMBEDDED}:")
            lines += [f"           {one.kind:<32}{one.recall:7.1%} {one.precision:7.1%}" for one in self.embedded]
            lines.append(f"alike      {len(self.alike):,} pairs of them, unchanged{self._examples()}")
        for name, counts in self.found.items():
            more = f", {counts['embedding']:,} pictures by embeddings" if self.embedded else ""
            lines.append(f"found      {counts['image']:,} pictures and {counts['text']:,} texts of {name}{more}")
        if not self.found:
            lines.append("found      nothing")
        return "\n".join(lines)

    def _examples(self) -> str:
        shown = [f"{' '.join(one)} = {' '.join(other)}" for one, other in self.alike[:_SHOWN]]
        return f": {'; '.join(shown)}" if shown else ""


def count_found(files: Sequence[Place]) -> dict[str, dict[str, int]]:
    """Samples by set whose picture or text is that of an evaluation set, from score files."""
    counts: Counter[tuple[str, str]] = Counter()
    for file in files:
        table = pq.read_table(
            arrow_source(file), columns=["scorer", "value", "detail"], filters=[("detail", "!=", "")]
        )
        for row in table.to_pylist():
            part = row["scorer"].rpartition(".")[2]
            if (row["value"] or 0) >= _LIMITS[part]:
                counts[row["detail"].split(",")[0], part] += 1
    names = sorted({name for name, _ in counts})
    return {name: {part: counts[name, part] for part in _LIMITS} for name in names}


def write_report(folder: Place, report: DecontaminationReport) -> None:
    """Write `report.json` and `report.html`; of the step only what a rerun would count as well."""
    content = dataclasses.asdict(report)
    del content["step"]
    for part in ("attacks", "embedded"):
        counts = getattr(report, part)
        content[part] = [{**one._asdict(), "recall": one.recall, "precision": one.precision} for one in counts]
    write_json(folder / "report.json", content)
    write_page(folder / "report.html", _page(report))


def _skipped(counts: dict[str, Any]) -> list[tuple[str, int, str]]:
    """Why pictures and rows of a set are left out: reason, how many, and the first of them."""
    return [(reason, count, counts["examples"][reason]) for reason, count in counts["skipped"].items()]


def _page(report: DecontaminationReport) -> str:
    by_embeddings = {"embedding": "found by embeddings"} if report.embedded else {}
    heads = {"image": "pictures found", "text": "texts found", **by_embeddings}
    sets = [
        (name, counts["pictures"], counts["texts"], *(report.found.get(name, {}).get(part, 0) for part in heads))
        for name, counts in report.contents.items()
    ]
    left_out = [(name, *row) for name, counts in report.contents.items() for row in _skipped(counts)]
    body = (
        "<h1>What of the evaluation sets is in the pool</h1>",
        _table(("set", "pictures", "texts", *heads.values()), sets),
        f"<h3>Left out</h3>{_table(('set', 'reason', 'number', 'the first'), left_out)}" if left_out else "",
        f"<h2>Self-test: {report.compared:,} evaluation pictures, changed and looked for</h2>",
        _tests(report.attacks),
        f"<h3>By a cosine of {EMBEDDED} of embeddings</h3>{_tests(report.embedded)}" if report.embedded else "",
        f"<h2>Evaluation pictures that are taken for each other: {len(report.alike):,}</h2>",
        _table(("picture", "taken for"), [(" ".join(one), " ".join(other)) for one, other in report.alike]),
    )
    return pages.page("Decontamination", "\n".join(body))


def _tests(counts: Sequence[AttackCounts]) -> str:
    rows = [(one.kind, one.pictures, f"{one.recall:.1%}", f"{one.precision:.1%}") for one in counts]
    return _table(("change", "pictures", "recall", "precision"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cells(row: Sequence[Any], kind: str) -> str:
        shown = (f"{cell:,}" if isinstance(cell, int) else escape(str(cell)) for cell in row)
        return "<tr>" + "".join(f"<{kind}>{cell}</{kind}>" for cell in shown) + "</tr>"

    return f"<table>{cells(head, 'th')}{''.join(cells(row, 'td') for row in rows)}</table>"
