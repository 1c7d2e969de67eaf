"""--deduplicate semantic: against brute force, bounded, by one model, and the same after a kill."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from open_qwen2vl.data.filtering.semantic import semantic_keepers
from open_qwen2vl.data.scoring.embeddings import embeddings_file, read_embeddings, write_embeddings
from tests.data.killed_step import OUTPUT, check_killed_step

from .conftest import uid_of

SIZE = 32


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def groups(seed: int, count: int, copies: int, noise: float = 0.1) -> np.ndarray:
    """`copies` of each of `count` directions, with a cosine of about 1 / (1 + noise^2) between two, in turns."""
    random = np.random.default_rng(seed)
    centres = unit(random.standard_normal((count, SIZE)))
    return unit(np.tile(centres, (copies, 1)) + noise / SIZE**0.5 * random.standard_normal((copies * count, SIZE)))


def brute_force(vectors: np.ndarray, similarity: float) -> list[int]:
    """Rows that stay, each compared with all that stay before it."""
    staying: list[int] = []
    for row, vector in enumerate(vectors):
        if not staying or (vectors[staying] @ vector).max() < similarity:
            staying.append(row)
    return staying


def test_one_cluster_equals_brute_force():
    vectors = groups(0, 240, 8)
    keepers = semantic_keepers(vectors, np.arange(len(vectors)), 0.95, 1 << 24, None)
    expected = brute_force(vectors, 0.95)
    assert np.flatnonzero(keepers < 0).tolist() == expected == list(range(240))
    gone = np.flatnonzero(keepers >= 0)
    assert (keepers[gone] == gone % 240).all()


def test_clusters_lose_few():
    vectors = groups(1, 1500, 4)
    keepers = semantic_keepers(vectors, np.arange(len(vectors)), 0.95, 1 << 24, 1)
    again = semantic_keepers(vectors, np.arange(len(vectors)), 0.95, 1 << 24, 1)
    gone = np.flatnonzero(keepers >= 0)
    assert (keepers == again).all() and (keepers[keepers[gone]] < 0).all()
    assert ((vectors[gone] * vectors[keepers[gone]]).sum(1) > 0.949).all()
    assert 0.99 * 4500 < len(gone) <= 4500


def test_many_copies_of_one_picture_cost_no_memory():
    vectors = np.tile(groups(2, 1, 1), (5000, 1)).astype(np.float16)
    keepers = semantic_keepers(vectors, np.arange(1, 5000), 0.95, 1, None)
    assert keepers[0] == -1 and (keepers[1:] == 0).all()


@pytest.fixture
def embedded(write_score_file):
    """`embedded(image, text, tar, model)`: scores with embeddings; the uids in the order of the rows."""

    def write(image: np.ndarray, text: np.ndarray, tar: str = "00000", model: str = "m") -> list[str]:
        uids = sorted(uid_of(1000 * int(tar) + row) for row in range(len(image)))
        recipe = {"options": {"keep_embeddings": True}}
        path = write_score_file("clip", {uid: 0.3 for uid in uids}, tar, recipe=recipe)
        write_embeddings(embeddings_file(path), uids, image, text, model, {"recipe": recipe})
        return uids

    return write


def test_pairs_that_show_the_same_go_with_their_keeper(embedded, choose, decisions):
    image, text = groups(3, 20, 2), groups(4, 40, 1)
    text[20] = text[0]
    image[39] = np.nan
    uids = embedded(image, text)
    kept, report = choose("clip > 0", deduplicate="semantic")
    assert kept == [*uids[:20], uids[39]] and report.duplicates == 19 and report.without_hash == 1
    assert decisions()[uids[25]] == (False, f"semantic duplicate of {uids[5]}")
    kept, report = choose("clip > 0", deduplicate="semantic", joint=True)
    assert report.duplicates == 1 and uids[20] not in kept
    assert choose("clip > 0", deduplicate="semantic", min_similarity=0.999)[1].duplicates == 0


def test_wrong_embeddings_are_one_line(embedded, choose, tmp_path, write_score_file):
    write_score_file("clip", {uid_of(1): 0.3})
    with pytest.raises(
        ValueError, match="--deduplicate semantic needs embeddings: run open-qwen2vl score with --keep"
    ):
        choose("clip > 0", deduplicate="semantic")
    embedded(groups(5, 4, 1), groups(6, 4, 1), "00001")
    embedded(groups(5, 4, 1), groups(6, 4, 1), "00002", model="other")
    with pytest.raises(ValueError, match=r"embeddings of other \(32 numbers\), others are of m \(32\)"):
        choose("clip > 0", deduplicate="semantic")
    path = tmp_path / "scores/clip/embeddings/00002.parquet"
    whole = (path.with_name("00001.parquet")).read_bytes()
    for content in (b"nothing", whole[:200], whole[: len(whole) // 2] + bytes(40) + whole[len(whole) // 2 + 40 :]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="00002.parquet: no embeddings of score --keep-embeddings"):
            choose("clip > 0", deduplicate="semantic")
    pq.write_table(pa.table({"uid": ["x"], "image": [[1.0]], "text": [[1.0]]}), path)
    with pytest.raises(ValueError, match="00002.parquet: no embeddings"):
        choose("clip > 0", deduplicate="semantic")
    table = pq.read_table(path.with_name("00001.parquet"))
    pq.write_table(table.set_column(0, "uid", pa.nulls(4, pa.string())), path)
    with pytest.raises(ValueError, match="00002.parquet: no embeddings .*: a uid is missing"):
        choose("clip > 0", deduplicate="semantic")
    other = {"recipe": {"options": {"keep_embeddings": True, "model": "x"}}}
    write_embeddings(path, [uid_of(1)], groups(5, 1, 1), groups(6, 1, 1), "x", other)
    with pytest.raises(ValueError, match="00002.parquet: embeddings of x, made with other options"):
        choose("clip > 0", deduplicate="semantic")
    path.unlink()
    with pytest.raises(ValueError, match="00002.parquet: missing, but .* run that score again"):
        choose("clip > 0", deduplicate="semantic")
    with pytest.raises(ValueError, match="--joint is for --deduplicate semantic"):
        choose("clip > 0", joint=True)
    with pytest.raises(ValueError, match="--min-similarity must be above 0"):
        choose("clip > 0", min_similarity=1.5)


def test_equal_images_have_a_similarity_of_1(embedded, choose):
    image = np.tile(groups(10, 30, 1), (2, 1))
    assert (np.linalg.norm(np.float32(np.float16(image)), axis=1) < 1).any()  # as they are kept
    embedded(image, groups(11, 60, 1))
    assert choose("clip > 0", deduplicate="semantic", min_similarity=1.0)[1].duplicates == 30


def test_16_bits_are_enough(tmp_path):
    image, text = groups(7, 50, 1), groups(8, 50, 1)
    write_embeddings(tmp_path / "a.parquet", [uid_of(row) for row in range(50)], image, text, "m", {})
    ((uids, joint),) = read_embeddings(tmp_path / "a.parquet", joint=True)
    mean = ((image @ image.T) + (text @ text.T)) / 2
    np.testing.assert_allclose(joint @ joint.T, mean, atol=1e-3)
    assert uids[3] == uid_of(3) and joint.shape == (50, 2 * SIZE)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_filter_ends_with_the_same_bytes(embedded, tmp_path, kills):
    for tar in range(2):
        embedded(groups(tar, 1500, 2), groups(9, 3000, 1), f"{tar:05d}")
    (tmp_path / "runs").mkdir()
    command = ["filter", str(tmp_path / "scores"), "--keep", "clip > 0", "--deduplicate", "semantic", "--threads", "1"]
    check_killed_step(
        [*command, "--output", f"{OUTPUT}/subset.npy"], tmp_path / "runs", kills=kills, preload=["faiss"]
    )
