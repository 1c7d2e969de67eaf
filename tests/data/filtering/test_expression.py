from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_qwen2vl.data.filtering.expression import (
    Comparison,
    Group,
    Listed,
    Top,
    clauses,
    parse_expression,
    show,
)

NAMES = st.sampled_from(["clip", "mlm-filter.semantic_understanding", "a_b.c-1", "basic"])
COMPARISONS = st.tuples(NAMES, st.sampled_from([">=", "<=", ">", "<"]), st.sampled_from(["0.3", "-2", "1e-3", "5."]))
TREES = st.recursive(
    COMPARISONS,
    lambda parts: st.one_of(
        st.tuples(st.just("not"), parts),
        st.tuples(st.sampled_from(["and", "or"]), parts, parts),
    ),
    max_leaves=12,
)


def text_of(tree) -> str:
    """With all parentheses."""
    if tree[0] == "not":
        return f"not ({text_of(tree[1])})"
    if tree[0] in ("and", "or"):
        return f"({text_of(tree[1])}) {tree[0]} ({text_of(tree[2])})"
    return " ".join(tree)


def negation(value):
    return None if value is None else not value


def both(values):
    return False if False in values else None if None in values else True


def compare(operator: str, score: float | None, number: float) -> bool | None:
    if score is None:
        return None
    return {">=": score >= number, "<=": score <= number, ">": score > number, "<": score < number}[operator]


def truth_of_tree(tree, scores) -> bool | None:
    """Kleene's logic on the tree as it was drawn."""
    if tree[0] == "not":
        return negation(truth_of_tree(tree[1], scores))
    if tree[0] == "and":
        return both([truth_of_tree(part, scores) for part in tree[1:]])
    if tree[0] == "or":
        return negation(both([negation(truth_of_tree(part, scores)) for part in tree[1:]]))
    return compare(tree[1], scores.get(tree[0]), float(tree[2]))


def truth(term, scores) -> bool | None:
    """The same on what was parsed."""
    if isinstance(term, Group):
        values = [truth(part, scores) for part in term.terms]
        return both(values) if term.every else negation(both([negation(value) for value in values]))
    value = compare(term.operator, scores.get(term.name), term.number)
    return negation(value) if term.negated else value


SCORES = st.dictionaries(NAMES, st.sampled_from([0.3, -2, 1e-3, 5, 0, 100]))


@given(TREES, SCORES)
def test_parsed_expression_means_what_was_written(tree, scores):
    term = parse_expression(text_of(tree))
    assert truth(term, scores) is truth_of_tree(tree, scores)
    assert parse_expression(show(term)) == term


def test_and_binds_tighter_than_or_and_not_tighter_than_both():
    term = parse_expression("a > 1 or not b > 2 and c > 3")
    assert show(term) == "a > 1 or (not b > 2 and c > 3)"
    assert show(parse_expression("not (a > 1 or b > 2) and c>3")) == "not a > 1 and not b > 2 and c > 3"


def test_clauses_of_every_kind():
    term = parse_expression("top(dfn-l, .15) and (in('x (1).npy') or not in( my list.npy )) and clip<=-1e-2")
    assert list(clauses(term)) == [
        Top("dfn-l", Fraction(15, 100), "top(dfn-l, .15)", False),
        Listed("x (1).npy", "in('x (1).npy')", False),
        Listed("my list.npy", "not in(my list.npy)", True),
        Comparison("clip", "<=", -0.01, "clip <= -1e-2", False),
    ]


def test_basic_is_datacomps_filter():
    assert show(parse_expression("basic()")) == (
        "basic.english > 0 and basic.words > 2 and basic.characters > 5 and basic.smaller_side >= 200 "
        "and basic.aspect_ratio <= 3"
    )


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 1, "found the end"),
        ("clip", 5, "expected one of >= <= > < after clip"),
        ("clip >= x", 9, "expected a number"),
        ("clip >= nan", 9, "expected a number"),
        ("clip >= 1e400", 9, "a number that a score can have"),
        ("clip < -1e999", 8, "a number that a score can have"),
        ("clip > 1e-400", 8, "a number that a score can have"),
        ("clip == 0.3", 6, "may stand here, found '='"),
        ("clip >= 0.3.4", 9, "may stand here"),
        ("a > 1 b > 2", 7, "expected 'and', 'or' or the end"),
        ("a > 1 AND b > 2", 7, "expected 'and', 'or' or the end, found 'AND'"),
        ("(a > 1", 7, "expected ')', found the end"),
        ("a > 1)", 6, "expected 'and', 'or' or the end"),
        ("a > 1 and and b > 2", 11, "expected a score's name"),
        ("top(clip, 0)", 11, "above 0 and at most 1"),
        ("top(clip, 1.01)", 11, "above 0 and at most 1"),
        ("top(clip)", 9, "expected ','"),
        ("in()", 4, "expected a file name"),
        ("in(a.npy", 4, "expected a file name"),
        ("__import__('os')", 1, "there are top(NAME, FRACTION), in(FILE), basic()"),
        ("a > 1; DROP TABLE pairs", 6, "may stand here, found ';'"),
        ("not " * 200 + "a > 1", 401, "more than 100 levels"),
        ("(" * 200 + "a > 1", 101, "more than 100 levels"),
    ],
)
def test_mistake_is_named_with_its_column(text, column, message):
    with pytest.raises(ValueError) as error:
        parse_expression(text)
    assert f"column {column}: " in str(error.value) and message in str(error.value)


@given(st.text("abct()op,in'\" <>=0.1-andor\n", max_size=40))
def test_any_text_parses_or_is_one_clear_error(text):
    try:
        term = parse_expression(text)
    except ValueError as error:
        assert str(error).startswith("--keep, column ")
    else:
        assert parse_expression(show(term)) == term


def test_contaminated_stands_for_pictures_and_texts():
    image, text = "contaminated.image >= 0.85", "contaminated.text >= 0.5"
    assert show(parse_expression("contaminated()")) == f"{image} or {text}"
    assert show(parse_expression("not contaminated()")) == f"not {image} and not {text}"
    assert (
        show(parse_expression("not contaminated(0.3) and clip > 1"))
        == f"not {image[:-4]}0.7 and not {text} and clip > 1"
    )
    for wrong in ("contaminated(1)", "contaminated(-1)", "contaminated(x)"):
        with pytest.raises(ValueError, match="column"):
            parse_expression(wrong)
