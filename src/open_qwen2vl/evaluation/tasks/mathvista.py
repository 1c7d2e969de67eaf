"""MathVista without a judge: lmms-eval's direct-answer prompt, and answers read by rules.

The suite (like MathVista's authors) asks an LLM to copy the answer out of the response, takes the option that is
nearest by edit distance where the copy is no option, and compares strings. Here rules read the answer, nothing found
is wrong, and numbers are compared as numbers, at the precision that the data set gives (answers.py).
"""

import ast
from typing import Any

from .answers import read_choice, read_list, read_number

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
    """The prompt of lmms-eval's `mathvista_testmini_format`: question, unit, options, form of the answer."""
    question = doc["question"] + (f" (Unit: {doc['unit']})" if doc["unit"] else "")
    options = [f"{letter}. {choice}" for letter, choice in _lettered(doc["choices"]).items()]
    places = int(doc["precision"] or 1)
    hint = _HINTS["text" if options else doc["answer_type"]].format(_WORDS.get(places, places), "s" * (places > 1))
    return "\n".join([question, *options, hint])


def read_answer(response: str, doc: dict[str, Any]) -> str | float | list[float] | None:
    """The option, the list, or the number at the row's precision (an integer is truncated, as the suite does)."""
    if doc["question_type"] == "multi_choice":
        return read_choice(response, doc["choices"])
    if doc["answer_type"] == "list":
        return read_list(response)
    number = read_number(response)
    if number is None:
        return None
    return float(int(number)) if doc["answer_type"] == "integer" else round(number, int(doc["precision"] or 1))


def mathvista_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score the only response: 0 or 1."""
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
