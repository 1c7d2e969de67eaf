"""Score files written by hand, for tests of the filter."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from open_qwen2vl.data.filtering import FilterOptions, SelectionReport, select_pairs
from open_qwen2vl.data.scoring.score_files import DETAIL, HASH_SCHEMA, SCHEMA, write_scores
from open_qwen2vl.data.storage.uids import UID_DTYPE, parse_uid, read_uids


def uid_of(number: int) -> str:
    """A uid that a number stands for; half of them have the highest bit."""
    return f"{(number * 0x9E3779B97F4A7C15F39CC0605CEDC835 + 1) % 2**128:032x}"


@pytest.fixture
def write_score_file(tmp_path) -> Callable[..., Path]:
    """`write_score_file("clip", {uid: value or reason}, tar="00000", model="m")`: a file in `tmp_path/scores`."""

    def write(
        name: str,
        values: Mapping[str, float | str | None],
        tar: str = "00000",
        model: str = "m",
        details: list[str] | None = None,
        **metadata,
    ):
        path = tmp_path / "scores" / name / f"{tar}.parquet"
        numbers = [value if isinstance(value, float | int) else None for value in values.values()]
        reasons = [value if isinstance(value, str) else None for value in values.values()]
        columns = [[f"k{uid[:4]}" for uid in values], list(values), [name] * len(values), [model] * len(values)]
        arrays = [
            pa.array(column, field.type) for column, field in zip([*columns, numbers, reasons], SCHEMA, strict=True)
        ]
        table = pa.table(arrays, schema=SCHEMA)
        if details is not None:
            table = table.append_column(DETAIL, pa.array(details, pa.string()))
        write_scores(path, table, {"recipe": {}, **metadata})
        return path

    return write


@pytest.fixture
def write_hash_file(tmp_path) -> Callable[..., Path]:
    """`write_hash_file({uid: (bytes_hash, phash)})`: a score file of `image-hash`; `None` where there is no hash."""

    def write(hashes: Mapping[str, tuple[int | None, int | None]], tar: str = "00000") -> Path:
        path, count = tmp_path / "scores" / "image-hash" / f"{tar}.parquet", len(hashes)
        columns = [[f"k{uid[:4]}" for uid in hashes], list(hashes), ["image-hash"] * count, ["imagehash"] * count]
        columns += [[None] * count, [None if all(pair) else "corrupt_image" for pair in hashes.values()]]
        columns += [list(column) for column in zip(*hashes.values(), strict=True)]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, HASH_SCHEMA, strict=True)]
        write_scores(path, pa.table(arrays, schema=HASH_SCHEMA), {"recipe": {}})
        return path

    return write


@pytest.fixture
def write_uid_file(tmp_path) -> Callable[..., Path]:
    """`write_uid_file(uids, name="list.npy")`: in the order given, in `tmp_path`."""

    def write(uids, name: str = "list.npy") -> Path:
        np.save(tmp_path / name, np.array([parse_uid(uid) for uid in uids], UID_DTYPE))
        return tmp_path / name

    return write


@pytest.fixture
def choose(tmp_path) -> Callable[..., tuple[list[str], SelectionReport]]:
    """`choose("clip > 1", **options)`: the uids that the scores in `tmp_path` keep, and the report."""

    def run(keep: str, **options) -> tuple[list[str], SelectionReport]:
        report = select_pairs(
            FilterOptions([tmp_path / "scores"], tmp_path / "subset.npy", keep, threads=1, **options)
        )
        uids = read_uids(tmp_path / "subset.npy")
        assert uids.tobytes() == np.unique(uids).tobytes() and report.kept == len(uids)
        return [f"{high:016x}{low:016x}" for high, low in uids.tolist()], report

    return run


@pytest.fixture
def decisions(tmp_path) -> Callable[[], dict[str, tuple[bool, str]]]:
    """`decisions()`: whether each uid was kept, and why."""

    def read() -> dict[str, tuple[bool, str]]:
        rows = pq.read_table(tmp_path / "subset_report" / "decisions.parquet").to_pylist()
        assert [row["uid"] for row in rows] == sorted({row["uid"] for row in rows})
        return {row["uid"]: (row["kept"], row["reason"]) for row in rows}

    return read
