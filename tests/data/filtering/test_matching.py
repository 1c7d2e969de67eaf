"""--like and --sample: task types of a reference, drawn in its proportions."""

import numpy as np
import pytest

from open_qwen2vl.data.filtering import FilterOptions, select_pairs
from open_qwen2vl.data.filtering.matching import _apportion
from open_qwen2vl.data.scoring.embeddings import embeddings_file, write_embeddings
from open_qwen2vl.data.storage.uids import format_uid, read_uids

from .conftest import uid_of

SIZE, KINDS = 16, ("read the text", "count <things>", "name it")


@pytest.fixture
def embedded(write_score_file):
    """`embedded(name, counts, seed)`: so many samples of three kinds, and their uids by kind."""
    middles = np.random.default_rng(0).standard_normal((3, SIZE))

    def write(name: str, counts: tuple[int, ...], seed: int, model: str = "m") -> list[list[str]]:
        kinds = np.repeat(np.arange(3), counts)
        vectors = middles[kinds] + 0.1 * np.random.default_rng(seed).standard_normal((len(kinds), SIZE))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        uids = [uid_of(10_000 * seed + row) for row in range(len(kinds))]
        recipe = {"options": {"keep_embeddings": True}}
        details = [KINDS[kind] for kind in kinds]
        path = write_score_file(name, dict.fromkeys(uids, 0.3), recipe=recipe, details=details)
        write_embeddings(embeddings_file(path), uids, vectors, vectors, model, {"recipe": recipe})
        return [[uid for uid, own in zip(uids, kinds, strict=True) if own == kind] for kind in range(3)]

    return write


@pytest.fixture
def match(tmp_path):
    """`match("like", 3)`: a selection of the scores `clip` like others, and its uids."""

    def run(like: str, wanted: int | None, **options):
        scores = tmp_path / "scores"
        more = {"threads": 1, "task_types": 3, **options}
        chosen = FilterOptions(
            (scores / "clip",), tmp_path / "subset.npy", "clip >= 0", like=(scores / like,), sample=wanted, **more
        )
        return select_pairs(chosen), {format_uid(*uid) for uid in read_uids(tmp_path / "subset.npy").tolist()}

    return run


@pytest.fixture
def drawn(embedded, match):
    """`drawn(N)`: the report, how many of each kind are drawn, and which, from 400, 100 and 20 of the kinds."""
    kinds = embedded("clip", (400, 100, 20), 1)
    embedded("like", (60, 100, 40), 2)

    def draw(wanted: int, **options):
        report, uids = match("like", wanted, **options)
        return report, [len(uids & set(own)) for own in kinds], uids

    return draw


def test_the_proportions_of_a_reference(drawn, tmp_path):
    report, counts, uids = drawn(100)
    assert counts == [30, 50, 20] and report.kept == 100 and report.not_drawn == 420
    assert [one.reference for one in report.matching.types] == [100, 60, 40]
    assert [one.example for one in report.matching.types] == [KINDS[1], KINDS[0], KINDS[2]]
    assert report.matching.distance(before=True) > 0.4 and report.matching.distance(before=False) == 0
    assert "task types  3, 46.9% away from the reference's shares before, 0.0% after" in str(report)
    assert drawn(100)[2] == uids and drawn(100, threads=2)[2] == uids
    other = drawn(100, seed=1)
    assert other[1] == counts and other[2] != uids
    page = next(tmp_path.rglob("index.html")).read_text()
    assert "count &lt;things&gt;" in page and "count <things>" not in page and "drawn by task type" in page


def test_what_is_wanting_is_told_and_not_made_up_for(drawn):
    report, counts, _ = drawn(200)
    assert counts == [60, 100, 20]
    assert "20 are wanting in 1 types" in str(report)


def test_whole_numbers_for_shares():
    assert _apportion(np.array([1, 1, 1]), 10).tolist() == [4, 3, 3]
    assert _apportion(np.array([7, 2, 1]), 1).tolist() == [1, 0, 0]
    for wanted in range(1, 40):
        assert _apportion(np.array([5, 3, 3, 1]), wanted).sum() == wanted


def test_what_cannot_be_matched(embedded, write_score_file, match):
    embedded("clip", (5, 5, 5), 1)
    embedded("other", (5, 5, 5), 2, model="another")
    write_score_file("plain", {uid_of(1): 0.5})
    for like, wanted, message in (
        ("other", 3, "embeddings of another model"),
        ("plain", 3, "--like needs embeddings"),
        ("other", None, "go together"),
        ("other", 0, "--sample must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            match(like, wanted)
