"""MathVista without a judge: lmms-eval's direct-answer prompt, and answers read by rules.

The suite (like MathVista's authors) asks an LLM to copy the answer out of the response, takes the option that is
nearest by edit distance where the copy is no option, and compares strings. Here rules read the answer, nothing found
is wrong, and numbers are compared as numbers, at the precision that the data set gives. All functions are pure.
"""

import ast
import math
import re
from typing import Any

# 1,234.5 | 12.5 | .5, with a sign that is not a subtraction's.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")
_MARKER = re.compile(r"answer(?:\s+is|\s*:)\s*", re.IGNORECASE)
_HINTS = {
    "text": "Answer with the option's letter from the given choices directly.",
    "integer": "Answer the question using a single integer number.",
    "float": "Answer the question using a single floating-point number with {} decimal place{}.",
    "list": "Answer the question using a Python list.",
}
_WORDS = {1: "one", 2: "two", 3: "three"}


def mathvista_visuals(doc: dict[str, Any]) -> list:
    """The image of a row, as RGB."""
    return [doc["decoded_image"].convert("RGB")]


def mathvista_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The prompt: question with its unit, options, and what form the answer has.

    Args:
        doc (`dict[str, Any]`): a row.
        lmms_eval_specific_kwargs (`dict`, *optional*): not used.

    Returns:
        `str`: the prompt of lmms-eval's `mathvista_testmini_format`.
    """
    question = doc["question"] + (f" (Unit: {doc['unit']})" if doc["unit"] else "")
    options = [f"{letter}. {choice}" for letter, choice in _lettered(doc["choices"]).items()]
    places = int(doc["precision"] or 1)
    hint = _HINTS["text" if options else doc["answer_type"]].format(_WORDS.get(places, places), "s" * (places > 1))
    return "\n".join([question, *options, hint])


def read_choice(response: str, choices: list[str]) -> str | None:
    """Which option a response names.

    Args:
        response (`str`): the model's answer.
        choices (`list[str]`): the options.

    Returns:
        `str`: the option that the response equals; else the one whose letter stands alone after "answer is", at the
        start, in parentheses or at the end; else the only one whose text occurs in it; `None` where none does.
    """
    response = response.strip()
    by_text = {choice.strip().lower(): choice for choice in choices}
    if (text := response.strip(" .").lower()) in by_text:
        return by_text[text]
    lettered = _lettered(choices)
    letters = "".join(lettered)
    marked = _MARKER.split(response)[-1] if _MARKER.search(response) else response
    at_start = rf"\(?(?i:([{letters}]))(?:\)|[.:,](?:\s|$)|\s*$)"
    for place in (at_start, rf".*\((?i:([{letters}]))\)", rf".*\s([{letters}])\.?$"):
        if found := re.match(place, marked, re.DOTALL):
            return lettered[found[1].upper()]
    low = response.lower()
    named = [choice for text, choice in by_text.items() if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", low)]
    return named[0] if len(named) == 1 else None


def read_number(response: str) -> float | None:
    """Which number a response gives.

    Args:
        response (`str`): the model's answer.

    Returns:
        `float`: the first number after the last "answer is" or "answer:", else the last one; `None` without any.
    """
    after = _NUMBER.search(_MARKER.split(response)[-1]) if _MARKER.search(response) else None
    numbers = [after[0]] if after else _NUMBER.findall(response)
    number = float(numbers[-1].replace(",", "")) if numbers else math.inf
    return number if math.isfinite(number) else None


def read_list(response: str) -> list[float] | None:
    """Which list of numbers a response gives.

    Args:
        response (`str`): the model's answer.

    Returns:
        `list[float]`: the last bracketed list, else all numbers in order; `None` where neither is there.
    """
    for bracketed in reversed(re.findall(r"\[[^\[\]]*\]", response)):
        try:
            return [float(number) for number in ast.literal_eval(bracketed)]
        except (ValueError, TypeError, OverflowError, SyntaxError):
            continue
    # "2007, 2008" holds two numbers, not one with a thousands separator.
    return [float(number) for number in re.findall(r"(?:(?<![\w)])-)?\d+(?:\.\d+)?", response)] or None


def read_answer(response: str, doc: dict[str, Any]) -> str | float | list[float] | None:
    """What a response answers, in the form that its question asks for.

    Args:
        response (`str`): the model's answer.
        doc (`dict[str, Any]`): the row.

    Returns:
        The option, the number at the row's precision (an integer is truncated to one, as the suite does), the list,
        or `None` where the response has none.
    """
    if doc["question_type"] == "multi_choice":
        return read_choice(response, doc["choices"])
    if doc["answer_type"] == "list":
        return read_list(response)
    number = read_number(response)
    if number is None:
        return None
    return float(int(number)) if doc["answer_type"] == "integer" else round(number, int(doc["precision"] or 1))


def mathvista_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a response.

    Args:
        doc (`dict[str, Any]`): the row.
        results (`list[str]`): the response, alone.

    Returns:
        `dict[str, float]`: `accuracy`, 0 or 1.
    """
    answer = read_answer(results[0], doc)
    if doc["question_type"] == "multi_choice":
        gold = doc["answer"]
    elif doc["answer_type"] == "list":
        gold = [float(number) for number in ast.literal_eval(doc["answer"])]
    else:
        gold = float(doc["answer"])
    return {"accuracy": float(answer is not None and answer == gold)}


def _lettered(choices: list[str] | None) -> dict[str, str]:
    return {chr(ord("A") + number): choice for number, choice in enumerate(choices or [])}
