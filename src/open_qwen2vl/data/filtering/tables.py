"""The tables that a selection works on, in a DuckDB file beside its output: memory stays bounded, the rest spills.

    score files (a row for each uid and score) ── GROUP BY uid ──┐
    in(FILE) arrays of uids ── LEFT JOIN ────────────────────────┴─► pairs: uid, row_id,
                                              s0 r0 s1 r1 ... (score, reason why there is none), f0 f1 ... (is in FILE)

A uid that stands in several tars is one pair: its largest score counts, and its first row names it. `row_id` is that
row of the score files: file * 2^32 + row.
"""

import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...places import Place
from ...transfers import fetch_all
from ..scoring.score_files import DETAIL, find_score_files, read_score_metadata
from ..storage.uids import read_uids

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)

UID = "TRY_CAST(uid AS UUID)"  # its order is that of the hex digits
FILE_FACTOR = 1 << 32
_ROW_ID = f"(file_index::BIGINT * {FILE_FACTOR} + file_row_number::BIGINT)"
_WITHOUT_KEY = 1 << 62  # added to the id, so that one with a key goes before
_UIDS_AT_ONCE = 1 << 20
_DUCKDB_SHARE = 0.6  # of the memory limit; the rest is for the process itself (0.8 GB), its batches and the uids
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", re.IGNORECASE)


class Scores(NamedTuple):
    """The score files of a selection."""

    files: list[Path]  # those with columns of their own last; of remote ones copies, for they are read several times
    places: list[Place]  # where these come from
    hash_files: list[Path]  # those with image hashes
    names: list[str]  # the values of the column `scorer`, sorted
    reasons: list[str]  # why there is no score, sorted
    detail_files: list[Path]  # those that say what a value comes from
    bad_uids: int  # rows left out because their uid is not 32 hex digits


class Columns(NamedTuple):
    """Which columns of `pairs` belong to what."""

    scores: dict[str, int]  # number of the columns `s` and `r` by the name of the score
    files: dict[str, int]  # number of the column `f` by the file of uids
    balances: dict[tuple[str, int], int]  # number of the column `b` by score and pairs of a concept
    details: tuple[int, ...] = ()  # numbers of the scores that have a column `d`, of `decided`

    def names(self) -> list[str]:
        """The columns' names in order."""
        scored = [f"{kind}{number}" for number in self.scores.values() for kind in "sr"]
        files, balances = ([f"{kind}{n}" for n in d.values()] for kind, d in (("f", self.files), ("b", self.balances)))
        return scored + files + balances


@contextmanager
def open_database(folder: Path, memory_limit: str, threads: int | None) -> "Iterator[duckdb.DuckDBPyConnection]":
    """A database in a folder of its own, which is removed at the end, and at the start if a killed run left it."""
    try:
        import duckdb
    except ImportError as error:
        raise ValueError('filter needs duckdb: pip install "open-qwen2vl[data]"') from error
    limit = int(parse_size(memory_limit) * _DUCKDB_SHARE)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with duckdb.connect(folder / "tables.duckdb") as connection:
            connection.execute(f"SET memory_limit = '{limit}B'")
            connection.execute("SET temp_directory = $folder", {"folder": str(folder / "spilled")})
            # Rows in the order of the files would have to be held back; what is written is sorted by uid.
            connection.execute("SET preserve_insertion_order = false")
            connection.execute("SET enable_progress_bar = false")
            if threads is not None:
                connection.execute(f"SET threads = {threads:d}")
            yield connection
    except duckdb.OutOfMemoryException as error:
        advice = "give a larger --memory-limit, fewer --threads or more room on the output's disk"
        raise ValueError(f"--memory-limit {memory_limit} is not enough: {advice} ({error})") from error
    except duckdb.Error as error:
        raise ValueError(f"the scores cannot be filtered: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_scores(connection: "duckdb.DuckDBPyConnection", paths: Sequence[str | Place], work: Path) -> Scores:
    """Look at the score files: which scores they hold, and whether each is of one model."""
    plain, detailed, hashed = [], [], []
    found = find_score_files(paths)
    copies = dict(zip(fetch_all(found, work / "scores"), found, strict=True))
    for path in copies:
        read_score_metadata(path)
        columns = pq.read_schema(path).names
        (hashed if "phash" in columns else detailed if DETAIL.name in columns else plain).append(path)
    files = [*plain, *detailed, *hashed]
    scores = Scores(files, [copies[path] for path in files], hashed, [], [], detailed, 0)
    kinds = connection.execute(
        f"SELECT scorer, model, reason, count(*) - count({UID}) FROM {score_rows(scores.files)} GROUP BY ALL"
    ).fetchall()
    models: dict[str, str | None] = {}
    for name, model, *_ in sorted(kinds, key=str):
        if models.setdefault(name, model) != model:
            raise ValueError(
                f"{name} comes from two models, {models[name]} and {model}: "
                "give only one's files, or score with another --name"
            )
    bad_uids = sum(kind[3] for kind in kinds)
    if bad_uids:
        logger.warning("skipped %d rows of score files: bad_uid (not 32 hex digits)", bad_uids)
    reasons = sorted({kind[2] for kind in kinds} - {None} | {"nan_score"})
    return scores._replace(names=sorted(models), reasons=reasons, bad_uids=bad_uids)


def score_rows(files: Sequence[Path]) -> str:
    """SQL for the rows of some files."""
    # A bracket stands for itself in brackets; else DuckDB would take such a name for a pattern.
    paths = (quoted(re.sub(r"[*?\[]", r"[\g<0>]", str(path))) for path in files)
    return f"read_parquet([{', '.join(paths)}], hive_partitioning = false)"


def fetch_row(
    connection: "duckdb.DuckDBPyConnection", statement: str, parameters: Mapping[str, Any] | None = None
) -> tuple:
    """The only row of a result."""
    (row,) = connection.execute(statement, parameters).fetchall()
    return row


def one_in(rows: int, wanted: int) -> str:
    """SQL that is true of some rows, chosen by their uids."""
    bits = max(0, (rows // wanted).bit_length() - 1)  # a remainder of 128-bit numbers takes a hundred times as long
    return f"uid::UHUGEINT & {(1 << bits) - 1} = 0"


def quoted(text: str) -> str:
    """A text as SQL."""
    return "'" + text.replace("'", "''") + "'"


def make_pairs(connection: "duckdb.DuckDBPyConnection", scores: Scores, columns: Columns) -> None:
    """Make the table `pairs`, without its columns `f` and `b`."""
    name_number = _numbered("scorer", list(columns.scores))
    reason_number = _numbered("reason", scores.reasons)
    row_id = f"{_ROW_ID} + CASE WHEN key IS NULL THEN {_WITHOUT_KEY} ELSE 0 END"
    gathered = [f"min(row_id) % {_WITHOUT_KEY} AS row_id"]
    for number in columns.scores.values():
        gathered.append(f"max(value) FILTER (part = {number}) AS s{number}")
        gathered.append(f"min(reason) FILTER (part = {number}) AS r{number}")
    connection.execute(
        f"""
        CREATE TABLE pairs AS SELECT uid, {", ".join(gathered)} FROM (
            SELECT {UID} AS uid, {row_id} AS row_id, {name_number} AS part, CASE WHEN isnan(value) THEN NULL ELSE value
                END AS value, CASE WHEN isnan(value) THEN {scores.reasons.index("nan_score")} ELSE {reason_number}
                END::SMALLINT AS reason
            FROM {score_rows(scores.files)} WHERE {UID} IS NOT NULL
        ) GROUP BY uid
        """
    )


def make_details(connection: "duckdb.DuckDBPyConnection", scores: Scores, columns: Columns) -> Columns:
    """Make the table `details` (uid, a column `d` for each score that has some), and name its columns."""
    if not scores.detail_files:
        connection.execute("CREATE TABLE details (uid UUID)")
        return columns
    rows = score_rows(scores.detail_files)
    found = connection.execute(f"SELECT DISTINCT scorer FROM {rows} WHERE detail IS NOT NULL").fetchall()
    numbers = tuple(sorted(columns.scores[name] for (name,) in found if name in columns.scores))
    # The detail of the value that counts; of equal values the last text, whatever the order of the rows.
    gathered = "".join(
        f", (max(struct_pack(v := value, d := detail)) FILTER (part = {number})).d AS d{number}" for number in numbers
    )
    connection.execute(
        f"""
        CREATE TABLE details AS SELECT uid{gathered} FROM (
            SELECT {UID} AS uid, {_numbered("scorer", list(columns.scores))} AS part, value, detail
            FROM {rows} WHERE detail <> '' AND value IS NOT NULL
        ) WHERE uid IS NOT NULL AND part IS NOT NULL GROUP BY uid
        """
    )
    return columns._replace(details=numbers)


def keys_of_rows(scores: Scores) -> str:
    """SQL for the keys that the score files name."""
    return f"(SELECT {_ROW_ID} AS row_id, key FROM {score_rows(scores.files)} WHERE key IS NOT NULL)"


def _numbered(column: str, values: list[str]) -> str:
    cases = " ".join(f"WHEN {quoted(value)} THEN {number}" for number, value in enumerate(values))
    return f"(CASE {column} {cases} END)" if values else "NULL"


def mark_file(connection: "duckdb.DuckDBPyConnection", path: str, number: int) -> int:
    """Add the column `f` of a file of uids to `pairs`; returns how many of its uids are not there."""
    connection.execute("CREATE TABLE listed (uid UUID)")
    uids = read_uids(path)
    for start in range(0, len(uids), _UIDS_AT_ONCE):
        piece = uids[start : start + _UIDS_AT_ONCE]
        halves = {name: np.ascontiguousarray(piece[field]) for name, field in (("high", "f0"), ("low", "f1"))}
        rows = connection.from_arrow(pa.table(halves))
        rows.project("((high::UHUGEINT << 64) | low::UHUGEINT)::UUID").insert_into("listed")
    return mark_listed(connection, number)


def mark_listed(connection: "duckdb.DuckDBPyConnection", number: int) -> int:
    """Add a column `f` to `pairs`, whether a uid is in `listed`, which goes; how many of that are no pair's."""
    # A join of its own: as further rows of the GROUP BY they would keep DuckDB from spilling it.
    connection.execute(
        f"""
        CREATE TABLE marked AS SELECT pairs.*, chosen.uid IS NOT NULL AS f{number}
        FROM pairs LEFT JOIN (SELECT DISTINCT uid FROM listed) AS chosen ON pairs.uid = chosen.uid
        """
    )
    connection.execute("DROP TABLE pairs")
    connection.execute("ALTER TABLE marked RENAME TO pairs")
    counts = f"(SELECT count(DISTINCT uid) FROM listed) - (SELECT count(*) FROM pairs WHERE f{number})"
    (unknown,) = fetch_row(connection, f"SELECT {counts}")
    connection.execute("DROP TABLE listed")
    return unknown


def parse_size(text: str) -> float:
    """Bytes of a size, as `4GB`."""
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"--memory-limit {text}: give a size, as 4GB or 500MB")
    return float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2].upper()))
