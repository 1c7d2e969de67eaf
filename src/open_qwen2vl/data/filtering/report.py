"""How many pairs a selection keeps and drops, and where: counted on the table `decided`."""

from dataclasses import dataclass, field
from typing import NamedTuple

from .balance import Tail, measure_tails
from .coverage import MANY_PASSES, Coverage
from .decisions import Selection, steps
from .expression import Clause, Top, clauses, show
from .matching import Matching
from .tables import fetch_row

SHORT_WORDS = 5  # captions with fewer are often taken for another language


class ClauseCounts(NamedTuple):
    """A clause, looked at alone."""

    text: str  # the clause; of a `top` clause with its threshold
    true: int  # pairs of which it is true
    false: int  # pairs of which it is false
    no_score: int  # pairs without the score


@dataclass
class SelectionReport:
    """Figures of a selection.

    Attributes:
        expression (`str`): what was to be kept.
        pairs (`int`): pairs that the score files name, each uid once.
        kept (`int`): of them chosen.
        steps (`list[tuple[str, int]]`): what pairs had to pass one after the other, and how many failed there.
        duplicates (`int`, *optional*): pairs dropped for another with an equal image; `None` if none were looked for.
        without_hash (`int`): pairs of which no image hash, or embedding, is known; they are no duplicates.
        clauses (`list[ClauseCounts]`): each clause alone.
        no_score (`dict[str, dict[str, int]]`): by score of the expression, how many pairs do not have it, by reason;
            empty with `--sql`.
        unscored (`dict[str, int]`): by file of an `in` clause, uids in it that no score file names.
        bad_uids (`int`): rows of score files left out, whose uid is not 32 hex digits.
        not_uids (`int`): rows of the result of `--sql` left out, which are no uid.
        short_foreign (`tuple[int, int]`, *optional*): pairs that `basic.english` takes for no English, and those of
            them with fewer than `SHORT_WORDS` words; `None` where the expression does not use both scores.
        coverage ([`Coverage`], *optional*): of the captions; `None` where they are not at hand.
        train_samples (`int`, *optional*): pairs that the training will read.
        tails (`list[Tail]`): concepts of each `balance` clause, before and after.
        matching ([`Matching`], *optional*): task types before and after, with `--like`.
        not_drawn (`int`): pairs that it did not draw.
    """

    expression: str
    pairs: int
    kept: int
    steps: list[tuple[str, int]]
    duplicates: int | None
    without_hash: int
    clauses: list[ClauseCounts]
    no_score: dict[str, dict[str, int]]
    unscored: dict[str, int]
    bad_uids: int
    not_uids: int = 0
    short_foreign: tuple[int, int] | None = None
    coverage: Coverage | None = None
    train_samples: int | None = None
    tails: list[Tail] = field(default_factory=list)
    matching: Matching | None = None
    not_drawn: int = 0

    @property
    def passes(self) -> float | None:
        """How often the training reads each kept pair."""
        return self.train_samples / self.kept if self.train_samples and self.kept else None

    def __str__(self) -> str:
        lines = [("pairs", f"{self.pairs:,}")]
        lines += [("dropped", f"{count:,} by {text}") for text, count in self.steps if count]
        if self.duplicates is not None:
            unknown = f" ({self.without_hash:,} pairs without an image hash or embedding)" if self.without_hash else ""
            lines.append(("duplicates", f"{self.duplicates:,}{unknown}"))
        if self.matching is not None:
            lines.append(("not drawn", f"{self.not_drawn:,}{_without(self.matching)}"))
        for name, reasons in self.no_score.items():
            lines += [("no score", f"{count:,} of {name}: {reason}") for reason, count in reasons.items()]
        lines += [("not scored", f"{count:,} uids of {path}") for path, count in self.unscored.items() if count]
        if self.not_uids:
            lines.append(("not a uid", f"{self.not_uids:,} rows of --sql"))
        if self.bad_uids:
            lines.append(("skipped", f"{self.bad_uids:,} rows of score files: bad_uid"))
        lines.append(("kept", f"{self.kept:,} ({self.kept / max(1, self.pairs):.1%})"))
        lines += [("balance", _tail_line(tail)) for tail in self.tails]
        lines += [("task types", matching_line(self.matching))] if self.matching is not None else []
        lines += self.training_lines()
        return "\n".join(f"{name:<12}{value}" for name, value in lines)

    def training_lines(self) -> list[tuple[str, str]]:
        """What the selection means for a training: languages, words, passes."""
        lines = []
        if self.short_foreign is not None and self.short_foreign[0]:
            foreign, short = self.short_foreign
            rule = f"fewer than {SHORT_WORDS} words, where fastText often errs"
            lines.append(("no English", f"{foreign:,} pairs, {short:,} of them of {rule}"))
        if self.coverage is not None:
            found = self.coverage
            lines.append(("words", f"{found.kept_words:,} of {found.words:,} in {_read(found)}"))
            lines.append(("concepts", f"{found.kept_concepts:,} of {found.concepts:,}{_lost(found)}"))
        if self.passes is not None:
            much = f"; above about {MANY_PASSES} they teach little, and a larger selection often trains better"
            lines.append(("passes", f"{self.passes:.1f} over each kept pair{much * (self.passes > MANY_PASSES)}"))
        return lines


def matching_line(matching: Matching) -> str:
    """How near the task types are to the reference's, and what is wanting."""
    before, after = matching.distance(before=True), matching.distance(before=False)
    short = [one for one in matching.types if one.after < one.wanted]
    wanting = sum(one.wanted - one.after for one in short)
    missing = f"; {wanting:,} are wanting in {len(short):,} types" if short else ""
    return f"{len(matching.types):,}, {before:.1%} away from the reference's shares before, {after:.1%} after{missing}"


def _without(matching: Matching) -> str:
    return f" ({matching.without:,} of them without an embedding)" if matching.without else ""


def _tail_line(tail: Tail) -> str:
    common = sum(count > tail.target for count in tail.before)
    heads = ", ".join(f"{name} {before:,} to {after:,}" for name, before, after in tail.heads[:3])
    rest = f"the {len(tail.before) - common:,} others {tail.whole[0]:,} to {tail.whole[1]:,}"
    return f"{common:,} concepts of more than {tail.target:,} pairs: {heads}; {rest}"


def _read(coverage: Coverage) -> str:
    part = f" of {coverage.tars:,} of {coverage.all_tars:,} tars" if coverage.tars < coverage.all_tars else ""
    return f"the captions{part}"


def _lost(coverage: Coverage) -> str:
    lost = ", ".join(f"{word} ({count:,})" for word, count in coverage.lost)
    return f"; lost, with their captions: {lost}" if lost else ""


def _short_foreign(selection: Selection) -> tuple[int, int] | None:
    numbers = selection.columns.scores
    if not {"basic.english", "basic.words"} <= numbers.keys():
        return None
    english, words = (f"s{numbers[f'basic.{part}']}" for part in ("english", "words"))
    counts = f"count(*) FILTER ({english} = 0), count(*) FILTER ({english} = 0 AND {words} < {SHORT_WORDS})"
    return fetch_row(selection.connection, f"SELECT {counts} FROM decided")


def measure(selection: Selection, unscored: dict[str, int], without_hash: int) -> SelectionReport:
    """Count."""
    by_step = dict(selection.connection.execute("SELECT step, count(*) FROM decided GROUP BY step").fetchall())
    return SelectionReport(
        expression=show(selection.term),
        pairs=sum(by_step.values()),
        kept=by_step.get(selection.kept, 0),
        steps=[(show(term), by_step.get(number, 0)) for number, term in enumerate(steps(selection.term))],
        duplicates=None if selection.deduplicate is None else by_step.get(selection.kept + 1, 0),
        without_hash=without_hash,
        clauses=_count_clauses(selection),
        no_score={name: _count_missing(selection, number) for name, number in selection.columns.scores.items()},
        unscored=unscored,
        bad_uids=selection.scores.bad_uids,
        short_foreign=_short_foreign(selection),
        tails=measure_tails(selection),
        not_drawn=by_step.get(selection.kept + 2, 0),
    )


def _count_clauses(selection: Selection) -> list[ClauseCounts]:
    statement, selected, found = selection.statement(), [], list(clauses(selection.term))
    for clause in found:
        condition = statement.condition(clause)
        selected += [f"count(*) FILTER ({condition} IS {truth})" for truth in ("TRUE", "FALSE", "NULL")]
    numbers = fetch_row(selection.connection, f"SELECT {', '.join(selected)} FROM decided", statement.parameters)
    return [ClauseCounts(_text(selection, clause), *numbers[3 * i : 3 * i + 3]) for i, clause in enumerate(found)]


def _text(selection: Selection, clause: Clause) -> str:
    return f"{clause.text} (>= {selection.cuts[clause].threshold:.6g})" if isinstance(clause, Top) else clause.text


def _count_missing(selection: Selection, number: int) -> dict[str, int]:
    rows = selection.connection.execute(
        f"SELECT r{number}, count(*) FROM decided WHERE s{number} IS NULL GROUP BY 1 ORDER BY 1 NULLS LAST"
    ).fetchall()
    return {"not in the score files" if n is None else selection.scores.reasons[n]: count for n, count in rows}
