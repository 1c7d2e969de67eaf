"""What the report says of words, passes and short captions."""

import pytest

from .conftest import uid_of

CAPTIONS = [
    "A red fox.",
    "the fox runs",
    "fox and owl",
    "An owl",
    "an OWL in a tree",
    "two owls",
    "a tree with an owl",
]
UIDS = [uid_of(number) for number in range(len(CAPTIONS))]


@pytest.fixture
def pool(make_tar, sample, write_score_file, tmp_path):
    members = [sample(f"k{uid[:4]}", text, uid=uid) for uid, text in zip(UIDS, CAPTIONS, strict=True)]
    write_score_file("clip", {uid: number for number, uid in enumerate(UIDS)})
    return [str(make_tar(tmp_path / "00000.tar", [member for own in members for member in own]))]


def test_words_and_concepts_of_the_kept_captions(pool, choose):
    """Words: a red fox the runs and owl an in tree two owls with; concepts in three captions: fox and owl."""
    _, report = choose("clip >= 3", pool=pool)
    found = report.coverage
    assert (found.pairs, found.tars, found.all_tars) == (7, 1, 1)
    assert (found.words, found.kept_words) == (13, 8)
    assert (found.concepts, found.kept_concepts, found.lost) == (2, 1, [("fox", 3)])
    lines = str(report).splitlines()
    assert "words       8 of 13 in the captions" in lines
    assert "concepts    1 of 2; lost, with their captions: fox (3)" in lines
    _, report = choose("clip >= 0", pool=pool)
    assert report.coverage.kept_words == 13 and report.coverage.lost == []


def test_without_the_tars_there_is_no_coverage(pool, choose):
    _, report = choose("clip >= 3")
    assert report.coverage is None and "words" not in str(report)


def test_only_some_tars_of_a_large_pool_are_read(make_tar, sample, write_score_file, choose, tmp_path, monkeypatch):
    monkeypatch.setattr("open_qwen2vl.data.filtering.coverage.COVERED_PAIRS", 2)
    pool = []
    for number in range(3):
        uid = uid_of(number)
        write_score_file("clip", {uid: 1.0}, f"{number:05d}")
        pool.append(str(make_tar(tmp_path / f"{number:05d}.tar", sample(f"k{uid[:4]}", f"word{number}", uid=uid))))
    _, report = choose("clip > 0", pool=pool)
    assert (report.coverage.pairs, report.coverage.tars, report.coverage.all_tars) == (2, 2, 3)
    assert "in the captions of 2 of 3 tars" in str(report)


def test_passes_at_the_budget_of_the_training(pool, choose, tmp_path):
    _, report = choose("clip >= 3", pool=pool, train_samples=52)
    assert report.passes == 13
    assert "passes      13.0 over each kept pair; above about 4 they teach little" in str(report)
    page = (tmp_path / "subset_report" / "index.html").read_text()
    assert "Passes: 13.0 over each kept pair; above about 4" in page and "lost, with their captions: fox (3)" in page
    _, report = choose("clip >= 3", train_samples=16)
    assert str(report).splitlines()[-1] == "passes      4.0 over each kept pair"
    with pytest.raises(ValueError, match="--train-samples must be at least 1, got 0"):
        choose("clip >= 3", train_samples=0)


def test_short_captions_that_are_taken_for_no_english_are_counted(write_score_file, choose):
    english = {UIDS[0]: 0.0, UIDS[1]: 0.9, UIDS[2]: 0.0, UIDS[3]: 0.0}
    write_score_file("basic.english", english)
    write_score_file("basic.words", {UIDS[0]: 2.0, UIDS[1]: 2.0, UIDS[2]: 4.0, UIDS[3]: 5.0})
    kept, report = choose("basic.english > 0 or basic.words < 5")
    assert kept == sorted(UIDS[:3]) and report.short_foreign == (3, 2)
    assert "no English  3 pairs, 2 of them of fewer than 5 words, where fastText often errs" in str(report)
    assert choose("basic.english > 0")[1].short_foreign is None
