import json

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_qwen2vl.data.scoring import find_score_files, read_score_metadata
from open_qwen2vl.data.scoring.score_files import SCHEMA, score_table, write_scores

UID = "0123456789abcdef" * 2


def table(values=((0.5,), (float("nan"),)), labels=("clip",)):
    values = np.array(values)
    keys = [f"k{i}" for i in range(len(values))]
    return score_table(labels, "tiny", keys, [UID] * len(keys), values, [None] * len(keys), "nan_score")


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.floats(), st.floats(), st.none() | st.sampled_from(["corrupt_image", "bad_uid"])), max_size=9
    )
)
def test_a_value_or_a_reason(samples):
    values = np.array([sample[:2] for sample in samples]).reshape(-1, 2)
    reasons = [sample[2] for sample in samples]
    keys = [str(i) for i in range(len(samples))]
    found = score_table(["a.x", "a.y"], "m", keys, [UID] * len(keys), values, reasons, "nan_score")
    assert found.schema == SCHEMA and found.num_rows == 2 * len(samples)
    for row, part, value in zip(found.to_pylist(), np.repeat([0, 1], len(samples)), values.T.flat, strict=True):
        reason = reasons[int(row["key"])]
        assert row["scorer"] == ("a.x", "a.y")[part]
        if np.isfinite(value):
            assert (row["value"], row["reason"]) == (value, None)
        else:
            assert (row["value"], row["reason"]) == (None, reason or "nan_score")


def test_same_input_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_scores(tmp_path / name / "0.parquet", table(), {"recipe": {"model": "m"}, "samples": 2})
    assert (tmp_path / "a/0.parquet").read_bytes() == (tmp_path / "b/0.parquet").read_bytes()
    assert read_score_metadata(tmp_path / "a/0.parquet")["recipe"] == {"model": "m"}


def test_several_tables_and_none(tmp_path):
    write_scores(tmp_path / "two.parquet", iter([table(), table(((0.25,),), ("dfn",))]), {})
    assert pq.read_table(tmp_path / "two.parquet")["scorer"].to_pylist() == ["clip", "clip", "dfn"]
    write_scores(tmp_path / "none.parquet", iter([]), {})
    assert pq.read_table(tmp_path / "none.parquet").schema.equals(SCHEMA)


def test_an_error_leaves_nothing(tmp_path):
    def tables():
        yield table()
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_scores(tmp_path / "0.parquet", tables(), {})
    assert list(tmp_path.iterdir()) == []


def test_duckdb_reads_it(tmp_path):
    write_scores(tmp_path / "0.parquet", table(), {})
    query = f"SELECT key, scorer, value, reason FROM '{tmp_path}/*.parquet' WHERE scorer = 'clip' ORDER BY key"
    assert duckdb.sql(query).fetchall() == [("k0", "clip", 0.5, None), ("k1", "clip", None, "nan_score")]


def test_what_is_no_score_file(tmp_path):
    stranger, damaged, later = (tmp_path / f"{name}.parquet" for name in ("stranger", "damaged", "later"))
    pq.write_table(pa.table({"a": [1]}), stranger)
    damaged.write_bytes(b"PAR1")
    metadata = {"open_qwen2vl": json.dumps({"format_version": 99})}
    pq.write_table(table().replace_schema_metadata(metadata), later)
    for path, message in ((stranger, "not a file of scores"), (damaged, "not a file"), (later, "format version 99")):
        with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
            read_score_metadata(path)


def test_find_score_files(tmp_path):
    for name in ("b/clip/1", "b/clip/0", "a"):
        write_scores(tmp_path / f"{name}.parquet", table(), {})
    (tmp_path / "empty").mkdir()
    found = find_score_files([tmp_path / "b", tmp_path / "a.parquet", tmp_path / "b/clip"])
    assert found == [tmp_path / "b/clip/0.parquet", tmp_path / "b/clip/1.parquet", tmp_path / "a.parquet"]
    for paths, message in (([], "no scores given"), (["nowhere"], "nowhere"), ([tmp_path / "empty"], "no .parquet")):
        with pytest.raises(ValueError, match=message):
            find_score_files(paths)
