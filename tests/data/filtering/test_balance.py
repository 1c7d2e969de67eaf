"""balance(NAME, T): heads thinned to about T, tails whole, the same for every order and number of threads."""

from collections import Counter

import pytest

from open_qwen2vl.data.filtering.expression import Balance, parse_expression

from .conftest import uid_of

HEAD, TAIL = 600, 7


@pytest.fixture
def captions(write_score_file) -> dict[str, str]:
    """Concepts of each pair: many cats, few zebras, of which two are with cats, some of nothing; in two files."""
    named = {uid_of(number): "cat" for number in range(HEAD)}
    named |= {uid_of(HEAD + number): "zebra" if number > 1 else "cat, zebra" for number in range(TAIL)}
    named |= {uid_of(2000 + number): "" for number in range(20)}
    for tar in range(2):
        part = {uid: names for number, (uid, names) in enumerate(named.items()) if number % 2 == tar}
        values = {uid: float(len(names.split(", ")) if names else 0) for uid, names in part.items()}
        write_score_file("concepts", values, f"{tar:05d}", details=list(part.values()))
    write_score_file("clip", {uid: float(number) for number, uid in enumerate(named)})
    return named


def count(uids: list[str], named: dict[str, str]) -> Counter:
    return Counter(name for uid in uids for name in named[uid].split(", "))


def test_heads_are_thinned_and_tails_are_whole(captions, choose, decisions):
    uids, report = choose("balance(concepts, 50)")
    counts = count(uids, captions)
    assert 25 < counts["cat"] < 85 and counts["zebra"] == TAIL and counts[""] == 0
    (tail,) = report.tails
    assert tail.before == [HEAD + 2, TAIL] and tail.after == [counts["cat"], TAIL]
    assert tail.heads[0] == ("cat", HEAD + 2, counts["cat"]) and tail.whole == (TAIL, TAIL)
    assert f"1 concepts of more than 50 pairs: cat 602 to {counts['cat']}" in str(report)
    reasons = decisions()
    assert reasons[uid_of(HEAD)] == (True, "balance(concepts, 50): 2 (cat, zebra)")
    assert reasons[uid_of(2000)] == (False, "balance(concepts, 50): 0")
    assert choose("balance(concepts, 602)")[1].kept == HEAD + TAIL
    assert sorted(choose("not balance(concepts, 50)")[0]) == sorted(set(captions) - set(uids))


def test_seed_and_uid_alone_decide(captions, choose):
    uids, _ = choose("balance(concepts, 100)")
    assert choose("balance(concepts, 100) and clip >= 0")[0] == uids
    others = choose("balance(concepts, 100)", seed=1)[0]
    assert others != uids and abs(len(others) - len(uids)) < 60
    # What a smaller number keeps, a larger one keeps as well.
    assert set(choose("balance(concepts, 20)")[0]) <= set(uids)


def test_the_page_shows_the_tail(captions, choose, tmp_path):
    choose("balance(concepts, 50) and clip >= 3")
    page = (tmp_path / "subset_report/index.html").read_text()
    assert "The long tail of <code>balance(concepts, 50)</code>" in page and page.count("<polyline") == 2


def test_what_is_no_balance_is_named(captions, choose):
    with pytest.raises(ValueError, match="clip names no concepts; score with --scorer concepts"):
        choose("balance(clip, 5)")
    assert parse_expression("balance(a, 007)") == Balance("a", 7, "balance(a, 007)", False)
    for wrong in ("balance(a)", "balance(a, 0)", "balance(a, 1.5)", "balance(a, -3)", "balance(3, a)"):
        with pytest.raises(ValueError, match="--keep, column"):
            parse_expression(wrong)
