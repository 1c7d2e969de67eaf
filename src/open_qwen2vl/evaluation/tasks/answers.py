r"""Reading the answer out of what a model writes: the option that it names, the number or the list that it gives.

    response -> plain text (`**B**`, `$B$`, `\boxed{B}`, `\frac{3}{5}`, a Unicode minus) -> marked places first
    ("the answer is ...", a box), then the beginning, then the rest

Nothing found is `None`: a wrong answer is better than a guess. All functions are pure.
"""

import ast
import math
import re
import warnings

_WRAPPED = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_MARKS = re.compile(r"\*\*|__|`|\$|\\[()\[\]]|\\[,;! ]|</?answer>|(?<!\w)([*_])(?=\w[^*_]*\1)|(?<=\w)[*_](?=\W*$)")
_PLAIN = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full width
_PLAIN |= dict.fromkeys("\u2212\u2010\u2011\u2012\u2013", "-") | {"\u00d7": "x"} | dict.fromkeys("\u200b\ufeff", "")
_PLAIN |= {"\u00bd": " 1/2", "\u00bc": " 1/4", "\u00be": " 3/4"}
_PLAIN = str.maketrans(_PLAIN)
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_EXPONENT = re.compile(r"(?<=\d)[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
_BOX = re.compile(r"\\boxed\s*\{")
_MARKER = re.compile(
    r"\banswer(?:\s+(?:is|are|was|would\s+be|should\s+be|must\s+be|comes\s+to))?\s*[:=]?\s*"
    r"(?:(?:the\s+)?(?:option|choice|letter)\s*)?"
    r"|\b(?:correct|right|best)\s+(?:option|choice|one|letter)\s*(?:is|:)?\s*"
    r"|\b(?:option|choice|letter)\s*:?\s*(?=[(\[\"']?[A-Z]\b)"
    r"|\b(?:choose|chose|select|pick)\s+(?:option\s+|choice\s+)?(?=[(\[\"']?[A-Z]\b)",
    re.IGNORECASE,
)
_WEAK_MARKER = re.compile(r"(?<!not )(?<!cannot )(?<!n't )\b(?:is|be|it's)\s+(?=[(\[\"']?[A-Z]\b)")
# What follows a letter that is not the answer: a verdict, or another letter.
_DENIED = re.compile(
    r"[)\]]?(?:\s+(?:and\s+[A-Z]\s+)?(?:(?:is|are|was|were|can|could|does|do)(?:\s+not|n't)\b|cannot\b|"
    r"(?:is|are|was|were|seems?|looks?)\s+(?:\w+ly\s+)?(?:wrong|incorrect|false|out\b|ruled|excluded|eliminated)|"
    r"can\s+be\s+(?:\w+ly\s+)?(?:ruled|excluded|eliminated))"
    r"|,?\s+(?:or|and)\s+(?:maybe\s+|perhaps\s+|possibly\s+|also\s+)?[(\[]?[A-Z]\b)"
)
# What follows a letter that is the answer and no article.
_AFTER_LETTER = r"(?:is|because|since|as|seems|looks|would|due|given|for)\b"

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
# 1,234.5 | -3/5 | 2 1/2 | 1.2 x 10^3 | 1.2e3; a sign that is not a subtraction's, no digit of a name or power.
_NUMBER = re.compile(
    rf"(?<![A-Za-z\d_^])(?<!\d\.)(?<!\^\{{)((?:(?<![\w)])[-+])?)"
    rf"(?:(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])|({_DIGITS})\s*/\s*({_DIGITS})"
    rf"|({_DIGITS})(?:\s*(?:x|\*|\\times|\\cdot)\s*10\s*\^\s*\{{?\s*(-?\d+)\s*\}}?|[eE]([-+]?\d+)(?!\w)"
    rf"|\^\s*\{{?\s*(-?\d+)\s*\}}?)?)"
)
_ROOT = re.compile(
    rf"({_DIGITS})?\s*(?:\\sqrt\s*\{{\s*({_DIGITS})\s*\}}|\\sqrt\s*({_DIGITS})|\u221a\s*\(?({_DIGITS})\)?)"
)
_ASIDE = re.compile(r"\((?![\s$]*[-+]?[\d.,/]+[\s$]*\))[^()]*\)")  # not a number alone
_SPACED_SIGN = re.compile(r"(^|[=:(,]|\b(?:is|be|to|equals))\s*-\s+(?=[\d.])", re.IGNORECASE)
_SIGN_WORD = re.compile(r"\b(?:minus|negative)\s+(?=[\d.])", re.IGNORECASE)
# An answer alone on its line, with a unit of at most three words.
_ALONE = re.compile(
    r"[^\d\n]{0,3}[-+]?[\d.,/]+(?:\s*(?:x|\*|\\times)\s*10\s*\^\s*\{?-?\d+\}?)?(?:\s*[^\d\s=+*/-]\S*){0,3}\s*$"
)
_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_UNITS += " seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBER_WORDS = {word: float(number) for number, word in enumerate(_UNITS.split())}
_NUMBER_WORDS |= {word: 10.0 * number for number, word in enumerate(_TENS.split(), start=2)}
_WORDS = re.compile(rf"\b(?:({'|'.join(_TENS.split())})[-\s]+)?({'|'.join(_NUMBER_WORDS)})\b")
_LOOKED_AT = 400  # characters behind a marker
_MOST = 4000  # characters of the beginning, and of the end


def read_choice(response: str, choices: list[str]) -> str | None:
    """Which option a response names, `None` where it names none or several."""
    response = _bounded(response)
    marked, text = _boxed(response), _plain(response)
    by_text = {_flat(choice): choice for choice in choices}
    lettered = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", choices, strict=False))
    if (whole := _flat(response)) in by_text:
        return by_text[whole]
    if marked is not None and (found := _at_start(_plain(marked), by_text, lettered, True)):
        return found
    for pattern in (_MARKER, None, _WEAK_MARKER):
        places = [0] if pattern is None else [match.end() for match in pattern.finditer(text)][::-1]
        for place in places:
            if found := _at_start(text[place : place + _LOOKED_AT], by_text, lettered, pattern is not None):
                return found
    letters = "".join(lettered)
    alone = rf".*(?<!\bor)(?<!\band)(?<!maybe)(?<!perhaps)(?<!possibly)(?<!not)(?<!n't)\s([{letters}])[.!]?\s*$"
    for end in (rf".*[(\[](?i:([{letters}]))[)\]]", alone):
        if found := re.match(end, text, re.DOTALL):
            return lettered[found[1].upper()]
    return _only_named(text, by_text) or _equal_number(response, choices)


def read_number(response: str) -> float | None:
    """The number in a box, else the first after the last "answer is", else one that begins alone, else the last."""
    response = _bounded(response)
    marked, text = _boxed(response), _signed(_plain(response))
    if marked is not None and (numbers := _numbers(_result(_signed(_plain(marked))))):
        return numbers[-1]
    for match in reversed(list(_MARKER.finditer(text))):
        sentence = re.split(r"\n|[.!?](?:\s|$)", text[match.end() : match.end() + _LOOKED_AT], maxsplit=1)[0]
        if numbers := _numbers(_result(sentence)):
            return numbers[0]
    first, *_ = text.strip().split("\n")
    if _ALONE.match(first) and (numbers := _numbers(first)):
        return numbers[0]
    if numbers := _numbers(_ASIDE.sub(" ", text)) or _numbers(text):
        return numbers[-1]
    words = [_NUMBER_WORDS.get(tens, 0) + _NUMBER_WORDS[units] for tens, units in _WORDS.findall(text.lower())]
    return words[-1] if words else None


def read_list(response: str) -> list[float] | None:
    """The last bracketed list of numbers, else all numbers in order."""
    text = response.translate(_PLAIN)
    for bracketed in reversed(re.findall(r"\[[^\[\]]*\]", text)):
        try:
            with warnings.catch_warnings(action="ignore"):  # of the parser
                return [float(number) for number in ast.literal_eval(bracketed)]
        except (ValueError, TypeError, OverflowError, SyntaxError, MemoryError, RecursionError):
            continue
    # "2007, 2008" holds two numbers, not one with a thousands separator.
    return [float(number) for number in re.findall(r"(?:(?<![\w)])-)?\d+(?:\.\d+)?", text)] or None


def _bounded(response: str) -> str:
    """Beginning and end of a response without its thoughts: a model that repeats itself for ever costs no time."""
    response = _THOUGHT.sub("", response)
    return response if len(response) <= 2 * _MOST else f"{response[:_MOST]}\n{response[-_MOST:]}"


def _plain(text: str) -> str:
    """Text without the marks of Markdown and LaTeX."""
    text = _EXPONENT.sub(lambda match: "^" + match[0].translate(_RAISED), text).translate(_PLAIN)
    for _ in range(3):  # as deep as models nest them
        text = _FRACTION.sub(r"\1/\2", _WRAPPED.sub(r"\1", text))
    return _MARKS.sub("", text).strip()


def _flat(text: str) -> str:
    return _plain(text).strip(" .\"'").lower()


def _boxed(text: str) -> str | None:
    """What stands in the last box."""
    last = [match.start() for match in _BOX.finditer(text)][-1:]
    found = _WRAPPED.match(text, last[0]) if last else None
    return found[1] if found else None


def _at_start(text: str, by_text: dict[str, str], lettered: dict[str, str], marked: bool) -> str | None:
    """The option that a text begins with, by its letter or its words; after a marker a bare letter needs no more."""
    text = re.sub(r"^(?:[\s\"'*:=]|-(?![\d.]))+", "", text)
    low, letters = text.lower(), "".join(lettered)
    first = re.split(r"\n|\.(?:\s|$)", low, maxsplit=1)[0].strip(" .\"'")
    if first in by_text:
        return by_text[first]
    alone = rf"[(\[{{<]?(?i:([{letters}]))(?:[)\]\"'}}>]|[.:,;!?](?=\s|$)|[ \t]*(?:\n|$)|[ \t]+[-=]\s)"
    if found := re.match(alone, text):
        return None if _DENIED.match(text, found.end(1)) else lettered[found[1].upper()]
    begins = [own for own in by_text if own and re.match(re.escape(own) + r"(?!\w|[.,/:]\d)", low)]
    if found := re.match(rf"([{letters}])\s+(?=\S)", text):
        # "A cat" may be an article and its noun.
        rest = text[found.end() :]
        if _DENIED.match(text, found.end(1)):
            return None
        named = _only_named(rest, by_text) if found[1] in "AI" else None
        if named is not None and not re.match(_AFTER_LETTER, rest):
            return named
        if found[1] not in "AI" or marked or re.match(_AFTER_LETTER, rest):
            return lettered[found[1]]
    return by_text[max(begins, key=len)] if begins and marked else None


def _only_named(text: str, by_text: dict[str, str]) -> str | None:
    """The only option whose words occur; those inside a longer one that occurs do not count."""
    words = sorted(filter(None, by_text), key=len, reverse=True)
    if not words:
        return None
    pattern = rf"(?<![\w/-])(?<!\d[.,])(?:{'|'.join(map(re.escape, words))})(?!\w|[.,/:]\d)"
    named = {match[0] for match in re.finditer(pattern, text.lower())}
    return by_text[named.pop()] if len(named) == 1 else None


def _equal_number(response: str, choices: list[str]) -> str | None:
    """The option that is the response's number, where all options are numbers with at most a unit."""
    plain = [_signed(_plain(choice)) for choice in choices]
    numbers = [_numbers(own) if _ALONE.match(own) else [] for own in plain]
    given = read_number(response)
    equal = [choice for choice, own in zip(choices, numbers, strict=True) if own[:1] == [given]]
    return equal[0] if len(equal) == 1 and all(numbers) else None


def _signed(text: str) -> str:
    if "\u221a" in text or "\\sqrt" in text:
        text = _ROOT.sub(_root, text)
    return _SIGN_WORD.sub("-", _SPACED_SIGN.sub(r"\1 -", text))


def _root(match: re.Match) -> str:
    return repr(_float(match[1] or "1") * math.sqrt(_float(match[2] or match[3] or match[4])))


def _result(text: str) -> str:
    """What stands behind the last equals sign that a number follows."""
    parts = re.split(r"=|\\approx|\u2248", text)
    return next((part for part in reversed(parts) if _numbers(part)), text)


def _numbers(text: str) -> list[float]:
    """All finite numbers of a text."""
    numbers = []
    for match in _NUMBER.finditer(text):
        sign, whole, top, bottom, left, right, plain, power, exponent, raised = match.groups()
        try:
            if whole is not None:
                number = float(whole) + float(top) / float(bottom)
            elif left is not None:
                number = _float(left) / _float(right)
            else:
                number = float(f"{plain.replace(',', '')}e{int(power or exponent or 0)}") ** int(raised or 1)
        except (ZeroDivisionError, ValueError, OverflowError):
            continue
        if math.isfinite(number):
            numbers.append(-number if sign == "-" else number)
    return numbers


def _float(text: str) -> float:
    return float(text.replace(",", ""))
