"""Images that are there twice: files of equal bytes, and pictures whose perceptual hashes differ in few bits.

Near duplicates: pictures of one hash are a group, named by its smallest uid. Two hashes that differ in at most d of 64
bits agree in at least b - d of b blocks of bits, whichever they are; so for each choice of b - d blocks DuckDB joins
the hashes that agree in them and counts the other bits. b grows with the number of hashes, so that a join finds about
as many candidates as there are hashes. Then, in the order of the uids, a group goes if a group that stays is near:
each picture that goes is within d bits of one that stays (chains of near pictures do not collapse into one).
"""

import itertools
import math
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from .tables import UID, fetch_row, score_rows

if TYPE_CHECKING:
    import duckdb

_BITS = 64
_ROWS_AT_ONCE = 1 << 17


def find_duplicates(connection: "duckdb.DuckDBPyConnection", hash_files: list[Path], kind: str, distance: int) -> int:
    """Make the table `duplicates` (uid, keeper) from the table `candidates` (uid).

    Of pairs with equal images that with the smallest uid stays. Returns the number of candidates without a hash.
    """
    if not hash_files:
        raise ValueError(
            "--deduplicate needs image hashes: run open-qwen2vl score POOL --scorer image-hash and name its files too"
        )
    column = "bytes_hash" if kind == "exact" else "phash"
    connection.execute(
        f"""
        CREATE TABLE hashes AS SELECT uid, min({column}) AS hash
        FROM (SELECT {UID} AS uid, {column} FROM {score_rows(hash_files)}) SEMI JOIN candidates USING (uid)
        GROUP BY uid HAVING hash IS NOT NULL
        """
    )
    connection.execute(
        """
        CREATE TABLE groups AS SELECT hash, uid, row_number() OVER (ORDER BY uid) - 1 AS rank
        FROM (SELECT hash, min(uid) AS uid FROM hashes GROUP BY hash)
        """
    )
    connection.execute("CREATE TABLE near (rank BIGINT, keeper BIGINT)")
    if kind == "near" and distance:
        _find_near(connection, distance)
    connection.execute(
        """
        CREATE TABLE duplicates AS
        SELECT hashes.uid, coalesce(other.uid, own.uid) AS keeper
        FROM hashes JOIN groups AS own USING (hash)
        LEFT JOIN near ON near.rank = own.rank LEFT JOIN groups AS other ON other.rank = near.keeper
        WHERE hashes.uid <> coalesce(other.uid, own.uid)
        """
    )
    compared, candidates = fetch_row(
        connection, "SELECT (SELECT count(*) FROM hashes), (SELECT count(*) FROM candidates)"
    )
    for table in ("near", "groups", "hashes"):
        connection.execute(f"DROP TABLE {table}")
    return candidates - compared


def block_masks(hashes: int, distance: int) -> list[int]:
    """Masks of 64 bits: two hashes within the distance agree in all bits of at least one."""
    blocks = distance + 1
    needed = math.log2(max(2, hashes))
    while _BITS // blocks * (blocks - distance) < needed:
        blocks += 1
    edges = [_BITS * number // blocks for number in range(blocks + 1)]
    parts = [(1 << stop) - (1 << start) for start, stop in itertools.pairwise(edges)]
    return [sum(chosen) for chosen in itertools.combinations(parts, blocks - distance)]


def _find_near(connection: "duckdb.DuckDBPyConnection", distance: int) -> None:
    """Fill the table `near`: groups that go, and the group that stays in place of each."""
    (count,) = fetch_row(connection, "SELECT count(*) FROM groups")
    connection.execute("CREATE TABLE edges (low BIGINT, high BIGINT)")
    for mask in block_masks(count, distance):
        connection.execute(
            """
            INSERT INTO edges SELECT low.rank, high.rank
            FROM groups AS low JOIN groups AS high
                ON low.hash & $mask::UBIGINT = high.hash & $mask::UBIGINT AND low.rank < high.rank
            WHERE bit_count(xor(low.hash, high.hash)) <= $distance
            """,
            {"mask": mask, "distance": distance},
        )
    gone = bytearray(count)
    ranks, keepers = array("q"), array("q")
    for batch in connection.sql("SELECT high, low FROM edges ORDER BY high, low").to_arrow_reader(_ROWS_AT_ONCE):
        for high, low in zip(*(column.tolist() for column in batch.columns), strict=True):
            if not gone[high] and not gone[low]:
                gone[high] = 1
                ranks.append(high)
                keepers.append(low)
    columns = {"rank": np.array(ranks, np.int64), "keeper": np.array(keepers, np.int64)}
    connection.from_arrow(pa.table(columns)).insert_into("near")
    connection.execute("DROP TABLE edges")
