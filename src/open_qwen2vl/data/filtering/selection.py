"""The filter: from score files and an expression to the sorted uids of the pairs that stay, and a report.

    scores ── tables.py: pairs (a row for each uid) ── decisions.py: step ── duplicates.py: keeper ──► decided
                                                                                                         │
              subset.npy  ◄── one pass over decided, sorted by uid ──► report: decisions.parquet, index.html

All tables lie in `OUTPUT.work`, which is removed at the end. `decided.step` is the number of the first step that a
pair fails; one behind the last step means kept, two behind it a duplicate, three not drawn (matching.py). The output
is renamed into place last.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ...files import remove_temporaries, renamed_when_whole
from ...output_lock import only_writer
from ...pages import write_page
from ...places import Place, is_remote, place
from ...transfers import make_folder
from ..storage.tars import find_tars
from ..storage.uids import UID_DTYPE, write_uids
from . import sql
from .balance import mark_balanced
from .coverage import measure_coverage
from .decisions import Selection, find_cuts
from .duplicates import find_duplicates
from .examples import find_examples
from .expression import Balance, Listed, Term, clauses, parse_expression
from .histograms import histograms
from .matching import Matching, draw_like
from .options import FilterOptions
from .report import SelectionReport, measure
from .report_page import report_page
from .semantic import find_semantic_duplicates
from .tables import (
    FILE_FACTOR,
    Columns,
    Scores,
    find_scores,
    keys_of_rows,
    make_details,
    make_pairs,
    mark_file,
    open_database,
    parse_size,
)

if TYPE_CHECKING:
    import duckdb

DECISIONS_NAME, PAGE_NAME = "decisions.parquet", "index.html"
_ROWS_AT_ONCE = 1 << 17
_SQL_SHARE = 0.3  # of the memory limit, for a statement of --sql beside DuckDB's own tables
_VECTOR_SHARE = 0.1  # of the memory limit, for embeddings beside DuckDB's tables and the process
DECISIONS = pa.schema(
    [
        ("uid", pa.string()),  # 32 lower-case hex digits, sorted
        ("key", pa.string()),  # of the sample in its tar; null where the scores come from a table
        ("tar", pa.string()),  # name of its file without the suffix
        ("kept", pa.bool_()),
        ("reason", pa.string()),  # the first clause that decides, with the pair's score
    ]
)


def select_pairs(options: FilterOptions) -> SelectionReport:
    """Choose pairs by their scores. The same input gives the same bytes, with any number of threads.

    Args:
        options ([`FilterOptions`]): what is filtered, and how.

    Returns:
        [`SelectionReport`]: counts of pairs kept and dropped.

    Raises:
        ValueError: for an expression or a file of another form, a score that no file has, or, after the report is
            written, if no pair is left.
        OSError: if a file cannot be read or written.
    """
    output, folder = place(options.output), options.report_folder
    term = Listed(sql.NAME, sql.NAME, False) if options.keep is None else parse_expression(options.keep)
    tars = find_tars(options.pool) if options.pool else None
    with only_writer(output, is_file=True):
        return _select(options, output, folder, term, tars)


def _select(
    options: FilterOptions, output: Place, folder: Place, term: Term, tars: list[Place] | None
) -> SelectionReport:
    """All steps, by the one process that writes the output."""
    remove_temporaries([output, folder / DECISIONS_NAME, folder / PAGE_NAME])
    with (
        _work_folder(output) as work,
        open_database(work, options.memory_limit, options.threads) as connection,
        tqdm(total=4, unit=" steps") as bar,
    ):
        bar.set_description("reading scores")
        found = find_scores(connection, options.scores, work)
        columns = _columns(term, found)
        make_pairs(connection, found, columns)
        columns = make_details(connection, found, columns)
        unscored, not_uids = _mark_files(connection, columns, options, work)
        for clause in {(c.name, c.target): c for c in clauses(term) if isinstance(c, Balance)}.values():
            mark_balanced(connection, found, columns, clause, options.seed)
        _advance(bar, "deciding")
        cuts = find_cuts(connection, term, columns)
        selection = Selection(connection, term, found, columns, cuts, options.seed, options.deduplicate)
        selection = selection._replace(draws=bool(options.like))
        without_hash, matching = _decide(selection, options, work)
        figures = measure(selection, unscored, without_hash)
        figures.matching = matching
        if options.sql is not None:  # which of the scores it used is not known
            figures.expression, figures.not_uids, figures.no_score = options.sql, not_uids, {}
        _advance(bar, "writing decisions")
        make_folder(folder)
        uids = _write_decisions(selection, folder / DECISIONS_NAME, figures.kept)
        _advance(bar, "writing the report")
        figures.coverage, figures.train_samples = measure_coverage(selection, tars), options.train_samples
        page = report_page(figures, histograms(selection), find_examples(selection, tars))
        write_page(folder / PAGE_NAME, page)
        _advance(bar, "filtered")
    write_uids(output, uids)
    if not figures.kept:
        raise ValueError(
            f"{f'--keep {options.keep}' if options.keep else '--sql'}: no pair is left; {folder / PAGE_NAME} says why"
        )
    return figures


@contextlib.contextmanager
def _work_folder(output: Place) -> Iterator[Path]:
    """Beside the output, or on this machine (`TMPDIR`) where that is remote."""
    if not is_remote(output):
        yield output.with_name(f"{output.name}.work")
        return
    with tempfile.TemporaryDirectory(prefix="open-qwen2vl-") as folder:
        yield Path(folder) / "work"


def _advance(bar: tqdm, description: str) -> None:
    bar.update()
    bar.set_description(description)


def _mark_files(
    connection: "duckdb.DuckDBPyConnection", columns: Columns, options: FilterOptions, work: Path
) -> tuple[dict[str, int], int]:
    """Add the columns `f`; how many uids of each file, or of the statement, are no pair's, and of its rows no uid."""
    if options.sql is not None:
        memory = int(parse_size(options.memory_limit) * _SQL_SHARE)
        unknown, not_uids = sql.mark_chosen(connection, columns, options.sql, work, memory, options.threads)
        return {sql.NAME: unknown}, not_uids
    return {path: mark_file(connection, path, number) for path, number in columns.files.items()}, 0


def _columns(term: Term, scores: Scores) -> Columns:
    """A column for each score and file of the expression, of `--sql` for all; raises for a score that no file has."""
    if isinstance(term, Listed) and term.path == sql.NAME:
        return Columns({name: number for number, name in enumerate(scores.names)}, {sql.NAME: 0}, {})
    names, files, balances = {}, {}, {}
    for clause in clauses(term):
        if isinstance(clause, Listed):
            files.setdefault(clause.path, len(files))
        elif clause.name in scores.names:
            names.setdefault(clause.name, len(names))
            if isinstance(clause, Balance):
                balances.setdefault((clause.name, clause.target), len(balances))
        else:
            raise ValueError(f"--keep: no score is called {clause.name}; there are {', '.join(scores.names)}")
    return Columns(names, files, balances)


def _decide(selection: Selection, options: FilterOptions, work: Path) -> tuple[int, Matching | None]:
    """Make the table `decided`: `pairs` with `step`, `keeper`, `type` and details.

    Returns how many candidates have no image hash, or no embedding, and what `--like` came to.
    """
    connection, without_hash, kept = selection.connection, 0, selection.kept
    statement = selection.statement()
    if selection.deduplicate or selection.draws:
        chosen = f"{statement.condition(selection.term)} IS TRUE"
        connection.execute(f"CREATE TABLE candidates AS SELECT uid FROM pairs WHERE {chosen}", statement.parameters)
    if selection.deduplicate is None:
        connection.execute("CREATE TABLE duplicates (uid UUID, keeper UUID)")
    elif selection.deduplicate == "semantic":
        memory = int(parse_size(options.memory_limit) * _VECTOR_SHARE)
        like = (options.min_similarity, options.joint, memory, options.threads)
        without_hash = find_semantic_duplicates(connection, selection.scores.places, work, *like)
    else:
        hashed = selection.scores.hash_files
        without_hash = find_duplicates(connection, hashed, selection.deduplicate, options.near_distance)
    matching = None
    if selection.draws:
        drawing = (options.sample, options.task_types, options.seed, work, options.threads)
        matching = draw_like(connection, selection.scores.places, options.like, *drawing)
    else:
        connection.execute("CREATE TABLE undrawn (uid UUID, type INTEGER)")
    statement = selection.statement()
    later = f"WHEN keeper IS NOT NULL THEN {kept + 1} WHEN type IS NOT NULL THEN {kept + 2}"
    step = f"CASE {later} ELSE {statement.first_failing(selection.term)} END"
    details = [f"d{number}" for number in selection.columns.details]
    columns = ", ".join(["row_id", *selection.columns.names(), *details, "keeper", "type"])
    connection.execute(
        f"""
        CREATE TABLE decided AS SELECT uid, {columns}, ({step})::USMALLINT AS step
        FROM pairs LEFT JOIN duplicates USING (uid) LEFT JOIN undrawn USING (uid) LEFT JOIN details USING (uid)
        """,
        statement.parameters,
    )
    connection.execute("DROP TABLE pairs")
    return without_hash, matching


def _write_decisions(selection: Selection, path: Place, kept: int) -> np.ndarray:
    """Write the decision on each pair, sorted by uid; returns the uids of those that stay."""
    reason, parameters = selection.reason()
    # A statement for the join and one for the sort: in one, neither would leave the other the memory it needs.
    selection.connection.execute(
        "CREATE TABLE keyed AS SELECT decided.*, key "
        f"FROM decided LEFT JOIN {keys_of_rows(selection.scores)} USING (row_id)"
    )
    rows = selection.connection.sql(
        f"""
        SELECT (uid::UHUGEINT >> 64)::UBIGINT AS high, (uid::UHUGEINT & {2**64 - 1})::UBIGINT AS low,
            replace(uid::VARCHAR, '-', '') AS uid, key, row_id // {FILE_FACTOR} AS file,
            step = {selection.kept} AS kept, {reason} AS reason
        FROM (SELECT * FROM keyed ORDER BY uid)
        """,
        params=parameters,
    )
    uids, done = np.empty(kept, UID_DTYPE), 0
    tars = pa.array([file.stem for file in selection.scores.files])
    with renamed_when_whole(path) as temporary, pq.ParquetWriter(temporary, DECISIONS, compression="zstd") as writer:
        for batch in rows.to_arrow_reader(_ROWS_AT_ONCE):
            columns = [batch["uid"], batch["key"], tars.take(batch["file"]), batch["kept"], batch["reason"]]
            writer.write_table(pa.table(columns, schema=DECISIONS))
            chosen = batch.filter(batch["kept"])
            piece = uids[done : done + len(chosen)]
            piece["f0"], piece["f1"] = chosen["high"], chosen["low"]
            done += len(chosen)
    return uids
