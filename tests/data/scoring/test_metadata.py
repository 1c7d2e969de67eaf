import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from open_qwen2vl.cli import main
from open_qwen2vl.data.scoring import ScoreOptions, read_score_metadata, score_pool
from tests.data.killed_step import read_folder
from tests.data.scoring.conftest import rows

L14 = "clip_l14_similarity_score"


def datacomp_table(uids, scores, **columns):
    """A table of DataComp's form."""
    count = len(uids)
    return pa.table(
        {
            "uid": uids,
            "url": [f"http://x/{i}.jpg" for i in range(count)],
            "text": ["a cat"] * count,
            "original_width": pa.array([640] * count, pa.int64()),
            "original_height": pa.array([480] * count, pa.int64()),
            "clip_b32_similarity_score": pa.array([0.25] * count, pa.float32()),
            L14: pa.array(scores, pa.float64(), from_pandas=False),
            "face_bboxes": pa.array([[[0.1, 0.1, 0.2, 0.2]]] * count),
            "sha256": ["0" * 64] * count,
            **columns,
        }
    )


@pytest.fixture
def tables(tmp_path):
    folder = tmp_path / "metadata"
    folder.mkdir()
    uids = ["a" * 32, "B" * 32, "c" * 31, "d" * 32, None, "e" * 32]
    scores = [0.31, 0.22, 0.5, None, 0.5, float("nan")]
    pq.write_table(datacomp_table(uids, scores), folder / "0a.parquet", row_group_size=4)
    pq.write_table(datacomp_table(["f" * 32], [0.1]), folder / "0b.parquet")
    return folder


def test_columns_of_tables(tables, tmp_path, capsys):
    columns = f"{L14}, original_width"
    arguments = ["score", str(tables), "--scorer", "metadata", "--columns", columns, "--num-workers", "1"]
    assert main([*arguments, "--output", str(tmp_path / "scores")]) == 0
    found = rows(tmp_path / "scores/metadata/0a.parquet")
    assert {(r["uid"], r["value"], r["reason"]) for r in found if r["scorer"] == f"metadata.{L14}"} == {
        ("a" * 32, 0.31, None),
        ("b" * 32, 0.22, None),
        ("d" * 32, None, "no_value"),
        ("e" * 32, None, "nan_score"),
    }
    assert [r["value"] for r in found if r["scorer"] == "metadata.original_width"] == [640] * 4
    assert {r["key"] for r in found} == {None}
    assert len(rows(tmp_path / "scores/metadata/0b.parquet")) == 2
    metadata = read_score_metadata(tmp_path / "scores/metadata/0a.parquet")
    assert metadata["samples"] == 6 and metadata["skipped"] == {"bad_uid": 2, "no_value": 1, "nan_score": 1}
    assert metadata["recipe"]["options"] == {"columns": [L14, "original_width"]}
    assert "samples    7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("clip_h14", "0a.parquet: no column clip_h14 for --columns clip_h14; it has uid, url"),
        ("url", "0a.parquet: --columns url holds string, not numbers"),
        ("face_bboxes", "--columns face_bboxes holds list"),
    ],
)
def test_columns_that_cannot_be_taken(tables, tmp_path, column, message):
    with pytest.raises(ValueError, match=message):
        score_pool(ScoreOptions([tables], tmp_path / "scores", "metadata", columns=[column], num_workers=1))
    assert not (tmp_path / "scores").exists()


def test_tables_that_cannot_be_read(tmp_path, write_tar, sample):
    pq.write_table(pa.table({L14: [0.1]}), tmp_path / "nouid.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "nouid.parquet").read_bytes()[:-9])
    tar = write_tar(sample("a"))
    for path, message in (
        (tmp_path / "nouid.parquet", "nouid.parquet: no column uid"),
        (tmp_path / "cut.parquet", "cut.parquet: not a whole parquet file"),
        (tar, "00000.tar: --scorer metadata reads parquet files"),
    ):
        with pytest.raises(ValueError, match=message):
            score_pool(ScoreOptions([path], tmp_path / "scores", "metadata", columns=[L14], num_workers=1))
    assert not (tmp_path / "scores").exists()


def test_the_tables_themselves_are_not_overwritten(tables):
    """The scores of `metadata/` would go to `metadata/` beside it."""
    before = read_folder(tables)
    with pytest.raises(ValueError, match="metadata/0a.parquet: not a file of scores"):
        score_pool(ScoreOptions([tables], tables.parent, "metadata", columns=[L14], num_workers=1))
    assert read_folder(tables) == before
