"""Concept balancing by MetaCLIP's rule (arXiv 2309.16671): common things are thinned, rare ones stay whole.

A pair draws a number for each concept that its caption names, and stays if one of them is below t / count: concepts of
t pairs and fewer always pass. The number follows from seed, uid and concept alone. What names nothing does not pass.
"""

from typing import TYPE_CHECKING, NamedTuple

from ..scoring.score_files import SEPARATOR
from .expression import Balance, clauses
from .tables import UID, Columns, Scores, score_rows

if TYPE_CHECKING:
    import duckdb

    from .decisions import Selection

_HEADS = 10  # concepts that a report names


class Tail(NamedTuple):
    """How often concepts are named, before and after a selection."""

    text: str  # the clause
    target: int  # t
    before: list[int]  # pairs of each concept, the commonest first
    after: list[int]  # of the same, in their own order
    heads: list[tuple[str, int, int]]  # the commonest: pairs before and after
    whole: tuple[int, int]  # pairs of concepts with at most t of them, before and after


def mark_balanced(
    connection: "duckdb.DuckDBPyConnection", scores: Scores, columns: Columns, clause: Balance, seed: int
) -> None:
    """Add the column `b` of a clause to `pairs`, and make the table `named` of its number (uid, concept)."""
    number, score = columns.balances[clause.name, clause.target], columns.scores[clause.name]
    found = []
    if scores.detail_files:
        rows = score_rows(scores.detail_files)
        found = connection.execute(
            f"SELECT 1 FROM {rows} WHERE scorer = $name AND detail IS NOT NULL LIMIT 1", {"name": clause.name}
        ).fetchall()
    if not found:
        raise ValueError(f"--keep: {clause.name} names no concepts; score with --scorer concepts")
    connection.execute(
        f"""
        CREATE TABLE named{number} AS SELECT DISTINCT uid, concept FROM (
            SELECT {UID} AS uid, unnest(string_split(detail, $separator)) AS concept
            FROM {rows} WHERE scorer = $name AND detail <> ''
        ) WHERE uid IS NOT NULL
        """,
        {"separator": SEPARATOR, "name": clause.name},
    )
    connection.execute(
        f"""
        CREATE TABLE drawn AS SELECT DISTINCT uid FROM named{number}
        JOIN (SELECT concept, count(*) AS pairs FROM named{number} GROUP BY concept) USING (concept)
        WHERE pairs <= $target OR md5_number_lower($seed || replace(uid::VARCHAR, '-', '') || concept)
            < $target::HUGEINT * {2**64}::HUGEINT // pairs
        """,
        {"target": clause.target, "seed": f"{seed}:{clause.name}:"},
    )
    connection.execute(
        f"""
        CREATE TABLE marked AS
        SELECT pairs.*, CASE WHEN s{score} IS NOT NULL THEN drawn.uid IS NOT NULL END AS b{number}
        FROM pairs LEFT JOIN drawn ON pairs.uid = drawn.uid
        """
    )
    connection.execute("DROP TABLE pairs")
    connection.execute("ALTER TABLE marked RENAME TO pairs")
    connection.execute("DROP TABLE drawn")


def measure_tails(selection: "Selection") -> list[Tail]:
    """Count the concepts of each clause on the table `decided`."""
    tails = []
    for clause in dict.fromkeys(clause for clause in clauses(selection.term) if isinstance(clause, Balance)):
        number = selection.columns.balances[clause.name, clause.target]
        rows = selection.connection.execute(
            f"""
            SELECT concept, count(*) AS pairs, count(*) FILTER (step = {selection.kept})
            FROM named{number} JOIN decided USING (uid) GROUP BY concept ORDER BY pairs DESC, concept
            """
        ).fetchall()
        rare = [row for row in rows if row[1] <= clause.target]
        tails.append(
            Tail(
                clause.text,
                clause.target,
                [before for _, before, _ in rows],
                sorted((after for *_, after in rows), reverse=True),
                rows[:_HEADS],
                (sum(before for _, before, _ in rare), sum(after for *_, after in rare)),
            )
        )
    return tails
