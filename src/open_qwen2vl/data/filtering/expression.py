"""The language of `--keep`: which pairs stay, as a tree that nothing ever evaluates as code.

    or_terms:  and_terms ("or" and_terms)*
    and_terms: term ("and" term)*
    term:      "not" term | "(" or_terms ")" | NAME OPERATOR NUMBER | "top" "(" NAME "," FRACTION ")"
               | "in" "(" FILE ")" | "basic" "(" ")" | "contaminated" "(" [DISTANCE] ")"
               | "balance" "(" NAME "," NUMBER ")"

Names may hold `-` and `.`; a file name with a parenthesis stands in quotes. `not` is pushed down to the clauses while
reading (`not (a and b)` is `not a or not b`), which leaves a tree of two kinds of nodes.
"""

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

OPERATORS = (">=", "<=", ">", "<")
# DataComp's basic filter: English, more than 2 words and 5 characters, 200 pixels, at most 3 : 1.
BASIC = (
    ("english", ">", "0"),  # the scorer gives 0 where another language is likelier
    ("words", ">", "2"),
    ("characters", ">", "5"),
    ("smaller_side", ">=", "200"),
    ("aspect_ratio", "<=", "3"),
)
# Limits of `decontaminate`: similarity of pictures, and part of an evaluation text.
CONTAMINATED = (("image", "0.85"), ("text", "0.5"))
MAX_DEPTH = 100
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])"
    r"|(?P<name>[A-Za-z_][\w.-]*)|(?P<operator>>=|<=|>|<)|(?P<mark>[(),])|(?P<end>$))"
)
_FILE = re.compile(r"\s*(?:'(?P<single>[^']+)'|\"(?P<double>[^\"]+)\"|(?P<plain>[^'\"()]*[^'\"()\s]))\s*\)")


class Comparison(NamedTuple):
    """`NAME >= NUMBER`."""

    name: str  # a value of the score files' column `scorer`
    operator: str  # one of `OPERATORS`
    number: float  # what the score is compared with
    text: str  # the clause as it is shown
    negated: bool  # whether `not` stands before it


class Top(NamedTuple):
    """`top(NAME, FRACTION)`: the best pairs of those that have this score."""

    name: str  # a value of the score files' column `scorer`
    fraction: Fraction  # above 0, at most 1; exact, so that 0.29 of 100 pairs are 29
    text: str  # the clause as it is shown
    negated: bool  # whether `not` stands before it


class Listed(NamedTuple):
    """`in(FILE)`: the pairs whose uid stands in a file."""

    path: str  # an `.npy` file of uids
    text: str  # the clause as it is shown
    negated: bool  # whether `not` stands before it


class Balance(NamedTuple):
    """`balance(NAME, PAIRS)`: about so many pairs at most of each concept of `score --scorer concepts`."""

    name: str  # a value of the score files' column `scorer`
    target: int  # pairs of a concept, at least 1
    text: str  # the clause as it is shown
    negated: bool  # whether `not` stands before it


class Group(NamedTuple):
    """Several terms, at least two."""

    every: bool  # `True` for `and`, `False` for `or`
    terms: "tuple[Term, ...]"  # clauses, and groups of the other kind


Clause = Comparison | Top | Listed | Balance
Term = Clause | Group


def parse_expression(text: str) -> Term:
    """Read an expression."""
    return _Parser(text).parse()


def clauses(term: Term) -> Iterator[Clause]:
    """The clauses of an expression."""
    if isinstance(term, Group):
        for part in term.terms:
            yield from clauses(part)
    else:
        yield term


def show(term: Term) -> str:
    """An expression as text."""
    if not isinstance(term, Group):
        return term.text
    shown = (f"({show(part)})" if isinstance(part, Group) else show(part) for part in term.terms)
    return (" and " if term.every else " or ").join(shown)


class _Token(NamedTuple):
    kind: str  # number, name, operator, mark or end
    text: str
    start: int


class _Parser:
    """Recursive descent, a token ahead."""

    def __init__(self, text: str):
        self._text, self._place, self._depth = text, 0, 0
        self._token = self._read()

    def parse(self) -> Term:
        term = self._group(every=False, negated=False)
        if self._token.kind != "end":
            self._fail("expected 'and', 'or' or the end")
        return term

    def _read(self) -> _Token:
        match = _TOKEN.match(self._text, self._place)
        if match is None:
            start = len(self._text) - len(self._text[self._place :].lstrip())
            self._token = _Token("character", self._text[start], start)
            self._fail("a number, a name or one of >= <= > < ( ) , may stand here")
        self._place = match.end()
        return _Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup))

    def _next(self) -> _Token:
        token, self._token = self._token, self._read()
        return token

    def _fail(self, expected: str) -> None:
        found = "the end" if self._token.kind == "end" else repr(self._token.text)
        raise ValueError(f"--keep, column {self._token.start + 1}: {expected}, found {found} in {self._text.strip()}")

    def _expect(self, text: str) -> None:
        if self._token.text != text:
            self._fail(f"expected {text!r}")
        self._next()

    def _group(self, every: bool, negated: bool) -> Term:
        """A run of `or` terms, each a run of `and` terms; under `not` the two change places."""
        word = "and" if every else "or"
        terms = [self._term(negated) if every else self._group(True, negated)]
        while self._token.text == word:
            self._next()
            terms.append(self._term(negated) if every else self._group(True, negated))
        return _join(every is not negated, terms)

    def _term(self, negated: bool) -> Term:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._fail(f"more than {MAX_DEPTH} levels of parentheses or not")
        if self._token.text == "not":
            self._next()
            term = self._term(not negated)
        elif self._token.text == "(":
            self._next()
            term = self._group(every=False, negated=negated)
            self._expect(")")
        else:
            term = self._clause(negated)
        self._depth -= 1
        return term

    def _clause(self, negated: bool) -> Term:
        if self._token.kind != "name" or self._token.text in ("and", "or"):
            self._fail(
                "expected a score's name, top(...), in(...), basic(), contaminated(...), balance(...), 'not' or '('"
            )
        if self._text[self._place :].lstrip().startswith("("):
            return self._function(negated)
        name = self._next().text
        if self._token.kind != "operator":
            self._fail(f"expected one of {' '.join(OPERATORS)} after {name}")
        return _comparison(name, self._next().text, self._number(), negated)

    def _function(self, negated: bool) -> Term:
        function = self._token.text
        if function not in ("top", "in", "basic", "contaminated", "balance"):
            known = "top(NAME, FRACTION), in(FILE), basic(), contaminated() and balance(NAME, PAIRS)"
            self._fail(f"there are {known}: expected one of them")
        if function == "in":
            return self._listed(negated)
        self._next()
        self._expect("(")
        if function == "basic":
            self._expect(")")
            return _join(not negated, [_comparison(f"basic.{part}", *rest, negated) for part, *rest in BASIC])
        read = {"contaminated": self._contaminated, "balance": self._balance, "top": self._top}[function]
        term = read(negated)
        self._expect(")")
        return term

    def _contaminated(self, negated: bool) -> Term:
        limits = dict(CONTAMINATED)
        if self._token.kind == "number":
            token, distance = self._token, Fraction(self._number())
            if not 0 <= distance < 1:
                self._token = token
                self._fail("expected a distance from 0 to below 1")
            limits["image"] = f"{float(1 - distance):g}"
        terms = [_comparison(f"contaminated.{part}", ">=", limit, negated) for part, limit in limits.items()]
        return _join(negated, terms)

    def _balance(self, negated: bool) -> Balance:
        name = self._name_and_comma()
        token, text = self._token, self._number()
        if not re.fullmatch("0*[1-9][0-9]{0,17}", text):
            self._token = token
            self._fail("expected a number of pairs, at least 1")
        return Balance(name, int(text), _shown(f"balance({name}, {text})", negated), negated)

    def _name_and_comma(self) -> str:
        if self._token.kind != "name":
            self._fail("expected a score's name")
        name = self._next().text
        self._expect(",")
        return name

    def _top(self, negated: bool) -> Top:
        name = self._name_and_comma()
        token = self._token
        text = self._number()
        if not 0 < float(text) <= 1:
            self._token = token
            self._fail("expected a fraction above 0 and at most 1")
        return Top(name, Fraction(text), _shown(f"top({name}, {text})", negated), negated)

    def _listed(self, negated: bool) -> Listed:
        start = self._text.index("(", self._place) + 1
        match = _FILE.match(self._text, start)
        if match is None:
            self._token = _Token("file", self._text[start:], start)
            self._fail("expected a file name and ')'")
        self._place = match.end()
        self._token = self._read()
        path = match["single"] or match["double"] or match["plain"].strip()
        return Listed(path, _shown(f"in({match[0].rstrip(')').strip()})", negated), negated)

    def _number(self) -> str:
        if self._token.kind != "number":
            self._fail("expected a number")
        text = self._token.text
        # No score reaches an infinity, and all reach what is rounded to 0.
        if math.isinf(float(text)) or float(text) == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
            self._fail("expected a number that a score can have (at most about 1.8e308)")
        return self._next().text


def _comparison(name: str, operator: str, number: str, negated: bool) -> Comparison:
    return Comparison(name, operator, float(number), _shown(f"{name} {operator} {number}", negated), negated)


def _shown(text: str, negated: bool) -> str:
    return f"not {text}" if negated else text


def _join(every: bool, terms: list[Term]) -> Term:
    """One group; a term that is a group of the same kind gives its terms."""
    flat: list[Term] = []
    for term in terms:
        flat += term.terms if isinstance(term, Group) and term.every is every else [term]
    return flat[0] if len(flat) == 1 else Group(every, tuple(flat))
