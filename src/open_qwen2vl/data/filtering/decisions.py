"""Which pairs an expression keeps and why, as SQL over the table `pairs`.

A comparison without a score is neither true nor false, as SQL's NULL: `not` of it is not true either, and a pair stays
only where the whole expression is true. So no pair is kept because a score is missing, and `or` lets another clause
keep it. What the expression says reaches DuckDB as parameters and never as a part of a statement.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .expression import Balance, Comparison, Group, Listed, Term, Top, clauses
from .tables import Columns, Scores, fetch_row

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)

DUPLICATE_REASONS = {
    "exact": "same image file as ",
    "near": "near duplicate of ",
    "semantic": "semantic duplicate of ",
}


class Cut(NamedTuple):
    """What a `top(NAME, FRACTION)` clause comes to."""

    wanted: int  # pairs to keep, n: the fraction of those that have the score, rounded down
    threshold: float  # t, the n-th largest score; infinite where n is 0
    above: int  # pairs above t
    ties: int  # pairs at t; each is kept with probability (n - above) / ties


class Selection(NamedTuple):
    """An expression with all that its statements need."""

    connection: "duckdb.DuckDBPyConnection"  # with the table `pairs`, later `decided`
    term: Term  # the expression
    scores: Scores  # the score files
    columns: Columns  # of `pairs`
    cuts: dict[Top, Cut]  # of the `top` clauses
    seed: int  # which of the ties stay
    deduplicate: str | None  # `"exact"`, `"near"` or `"semantic"`
    draws: bool = False  # whether some of what is left are drawn, by `--like`

    @property
    def kept(self) -> int:
        """`decided.step` of the pairs that stay; that of duplicates is one more, that of what is not drawn two."""
        return len(steps(self.term))

    def statement(self) -> "Statement":
        """A writer for one statement."""
        return Statement(self.columns, self.cuts, self.seed, self.scores.reasons)

    def reason(self) -> tuple[str, dict[str, Any]]:
        """SQL for why a row of `decided` was kept or dropped, and its parameters."""
        statement = self.statement()
        cases = [
            f"WHEN step = {number} THEN {statement.explanation(term, False)}"
            for number, term in enumerate(steps(self.term))
        ]
        cases.append(f"WHEN step = {self.kept} THEN {statement.explanation(self.term, True)}")
        if self.deduplicate is not None:
            keeper = "replace(keeper::VARCHAR, '-', '')"
            duplicate = f"{statement.parameter(DUPLICATE_REASONS[self.deduplicate])} || {keeper}"
            cases.append(f"WHEN step = {self.kept + 1} THEN {duplicate}")
        if self.draws:
            without = "WHEN type < 0 THEN 'not drawn: no embedding'"
            cases.append(f"WHEN step = {self.kept + 2} THEN CASE {without} ELSE 'not drawn: task type ' || type END")
        return f"(CASE {' '.join(cases)} END)", statement.parameters


def find_cuts(connection: "duckdb.DuckDBPyConnection", term: Term, columns: Columns) -> dict[Top, Cut]:
    """Find the thresholds of an expression's `top` clauses."""
    cuts = {}
    for clause in clauses(term):
        if not isinstance(clause, Top):
            continue
        score = f"s{columns.scores[clause.name]}"
        (scored,) = fetch_row(connection, f"SELECT count({score}) FROM pairs")
        wanted = int(clause.fraction * scored)
        cut = Cut(0, float("inf"), 0, 0)
        if wanted:
            ranked = (
                f"SELECT {score} FROM pairs WHERE {score} IS NOT NULL ORDER BY {score} DESC LIMIT 1 OFFSET $before"
            )
            (threshold,) = fetch_row(connection, ranked, {"before": wanted - 1})
            counts = f"SELECT count(*) FILTER ({score} > $t), count(*) FILTER ({score} = $t) FROM pairs"
            cut = Cut(wanted, threshold, *fetch_row(connection, counts, {"t": threshold}))
        else:
            logger.warning("%s is not one pair of the %d that have the score", clause.text, scored)
        cuts[clause] = cut
    return cuts


def steps(term: Term) -> tuple[Term, ...]:
    """What a pair must pass one after the other: the terms that the outermost `and` joins."""
    return term.terms if isinstance(term, Group) and term.every else (term,)


class Statement:
    """Writes the parts of one SQL statement."""

    def __init__(self, columns: Columns, cuts: dict[Top, Cut], seed: int, reasons: Sequence[str]):
        self.parameters: dict[str, Any] = {}
        self._columns, self._cuts, self._seed, self._reasons = columns, cuts, seed, list(reasons)

    def parameter(self, value: Any) -> str:
        """What stands for a value in the statement."""
        name = f"p{len(self.parameters)}"
        self.parameters[name] = value
        return f"${name}"

    def condition(self, term: Term) -> str:
        """SQL: whether a pair is kept; NULL where a score is missing and decides."""
        if isinstance(term, Group):
            return "(" + (" AND " if term.every else " OR ").join(map(self.condition, term.terms)) + ")"
        if isinstance(term, Comparison):
            plain = f"(s{self._columns.scores[term.name]} {term.operator} {self.parameter(term.number)})"
        elif isinstance(term, Top):
            plain = self._is_top(term)
        elif isinstance(term, Balance):
            plain = f"b{self._columns.balances[term.name, term.target]}"
        else:
            plain = f"f{self._columns.files[term.path]}"
        return f"(NOT {plain})" if term.negated else plain

    def first_failing(self, term: Term) -> str:
        """SQL: index of the first of the `steps` that is not true, or their number."""
        parts = steps(term)
        cases = " ".join(f"WHEN {self.condition(part)} IS NOT TRUE THEN {n}" for n, part in enumerate(parts))
        return f"(CASE {cases} ELSE {len(parts)} END)::USMALLINT"

    def explanation(self, term: Term, true: bool) -> str:
        """SQL: why a term is true, or why it is not: its clauses with the pair's scores."""
        if not isinstance(term, Group):
            return self._shown(term)
        if term.every is true:
            return "concat_ws('; ', " + ", ".join(self.explanation(part, true) for part in term.terms) + ")"
        test = "IS TRUE" if true else "IS NOT TRUE"
        cases = (f"WHEN {self.condition(part)} {test} THEN {self.explanation(part, true)}" for part in term.terms)
        return f"(CASE {' '.join(cases)} END)"

    def _is_top(self, clause: Top) -> str:
        cut, score = self._cuts[clause], f"s{self._columns.scores[clause.name]}"
        threshold = self.parameter(cut.threshold)
        if cut.wanted == cut.above + cut.ties:
            return f"({score} >= {threshold})"
        # A tie draws its number from the uid, so that neither the order of the rows nor threads decide.
        drawn = f"md5_number_lower({self.parameter(f'{self._seed}:{clause.name}:')} || replace(uid::VARCHAR, '-', ''))"
        kept = self.parameter((cut.wanted - cut.above) * 2**64 // max(1, cut.ties))
        return (
            f"(CASE WHEN {score} > {threshold} THEN true WHEN {score} = {threshold} "
            f"THEN {drawn} < {kept} WHEN {score} IS NOT NULL THEN false END)"
        )

    def _shown(self, clause: Any) -> str:
        if isinstance(clause, Listed):
            return f"{self.parameter(clause.text + ': ')} || CASE WHEN f{self._columns.files[clause.path]} " + (
                "THEN 'yes' ELSE 'no' END"
            )
        number = self._columns.scores[clause.name]
        text = clause.text
        if isinstance(clause, Top):
            text += f" (>= {self._cuts[clause].threshold:.6g})"
        missing = f"concat('no score (' || {self.parameter(self._reasons)}[r{number} + 1] || ')')"
        score = f"coalesce(printf('%.6g', s{number}), nullif({missing}, ''), 'no score')"
        detail = f" || coalesce(' (' || d{number} || ')', '')" if number in self._columns.details else ""
        return f"{self.parameter(text + ': ')} || {score}{detail}"
