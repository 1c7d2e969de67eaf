"""`--sql`: one SELECT over the scores in place of an expression, for what the language of `--keep` cannot say.

The scores are copied to a database of their own, which is opened read-only, without access to files, network and
extensions, and with its settings locked, before the statement is looked at.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from .tables import UID, Columns, fetch_row, mark_listed

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)

NAME = "--sql"  # of its clause, in reasons and counts
_ROWS_AT_ONCE = 1 << 17


def mark_chosen(
    connection: "duckdb.DuckDBPyConnection", columns: Columns, query: str, work: Path, memory: int, threads: int | None
) -> tuple[int, int]:
    """Add the column `f` of the statement to `pairs`; how many of its uids are no pair's, how many rows no uid.

    `memory` are the bytes that the statement may take before it spills. A `ValueError` for what is not one SELECT or
    draws at random, for a result without the column `uid` or any uid in it, and for whatever DuckDB says of it.
    """
    import duckdb

    _copy_scores(connection, columns, work / "sql.duckdb")
    connection.execute("CREATE TABLE listed (uid UUID)")
    try:
        with _locked(work, memory, threads) as expert:
            found = _checked(expert, query)
            for batch in found.select("uid").to_arrow_reader(_ROWS_AT_ONCE):
                texts = pa.table({"uid": batch["uid"].cast(pa.string())})
                connection.from_arrow(texts).project(UID).insert_into("listed")
    except (duckdb.Error, pa.ArrowException) as error:
        raise ValueError(f"--sql: {' '.join(str(error).split())}") from error
    rows, uids = fetch_row(connection, "SELECT count(*), count(uid) FROM listed")
    if rows and not uids:
        raise ValueError(f"--sql: none of the {rows:,} rows of the result is a uid (32 hex digits)")
    if rows > uids:
        logger.warning("--sql: not a uid: %d of %d rows", rows - uids, rows)
    return mark_listed(connection, columns.files[NAME]), rows - uids


def _copy_scores(connection: "duckdb.DuckDBPyConnection", columns: Columns, path: Path) -> None:
    """The table `scores`: `uid`, a column of the name of each score, and `NAME.detail` where there are any."""
    selected = ["pairs.uid"]
    for name, number in columns.scores.items():
        quoted = name.replace('"', '""')
        selected.append(f's{number} AS "{quoted}"')
        if number in columns.details:
            selected.append(f'd{number} AS "{quoted}.detail"')
    connection.execute(f"ATTACH '{str(path).replace(chr(39), chr(39) * 2)}' AS expert")
    connection.execute(
        f"CREATE TABLE expert.scores AS SELECT {', '.join(selected)} FROM pairs LEFT JOIN details ON "
        "pairs.uid = details.uid"
    )
    connection.execute("DETACH expert")


@contextmanager
def _locked(work: Path, memory: int, threads: int | None) -> "Iterator[duckdb.DuckDBPyConnection]":
    import duckdb

    with duckdb.connect(work / "sql.duckdb", read_only=True) as expert:
        expert.execute("SET temp_directory = $folder", {"folder": str(work / "sql_spilled")})
        expert.execute(f"SET memory_limit = '{memory:d}B'")
        if threads is not None:
            expert.execute(f"SET threads = {threads:d}")
        for setting in ("autoinstall_known_extensions", "autoload_known_extensions", "enable_external_access"):
            expert.execute(f"SET {setting} = false")
        expert.execute("SET lock_configuration = true")
        yield expert


def _checked(expert: "duckdb.DuckDBPyConnection", query: str) -> "duckdb.DuckDBPyRelation":
    import duckdb

    statements = expert.extract_statements(query)
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        kinds = ", ".join(str(statement.type).rpartition(".")[2] for statement in statements) or "nothing"
        raise ValueError(f"--sql takes one SELECT, this is {kinds}")
    _check_reproducible(expert, statements[0].query)
    found = expert.sql(statements[0].query)
    if "uid" not in found.columns:
        raise ValueError(f"--sql: the result has no column uid, but {', '.join(found.columns)}")
    return found


def _check_reproducible(expert: "duckdb.DuckDBPyConnection", query: str) -> None:
    """Raise for what gives other pairs each time, by the parsed statement: not by a comment or a text in it."""
    (tree,) = fetch_row(expert, "SELECT json_serialize_sql($query)", {"query": query})
    if json.loads(tree)["error"]:
        raise ValueError(f"--sql: {json.loads(tree)['error_message']}")
    # A quote within a text of the statement is escaped there.
    called = {name.lower() for name in re.findall(r'"function_name":"([^"\\]+)"', tree)}
    volatile = expert.execute("SELECT function_name FROM duckdb_functions() WHERE stability = 'VOLATILE'").fetchall()
    drawn = sorted(f"{name}()" for name in called & {name for (name,) in volatile})
    drawn += ["a sample"] if '"sample":{' in tree else []
    if drawn:
        raise ValueError(f"--sql: {drawn[0]} gives other pairs each time; draw by the uid, as hash(uid) % 10 = 0")
