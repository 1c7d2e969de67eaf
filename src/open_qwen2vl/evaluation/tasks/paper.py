r"""The original's evaluation rules: prompts and scoring of its eight benchmarks, for the YAML in `paper_rules/`.

    <s> image "\n{question}\n{options}\nAnswer with ... directly.\nAnswer:"  ->  16 tokens, greedy, cut at , . \n

A prompt is plain text to be continued, without a chat template; texts start with the newline that follows the image.
Lenient rules are kept as they are: they explain the paper's numbers. What is MMMU's and TextVQA's own is lmms-eval's
code for it. lmms-eval calls `*_text` and `*_visuals` with a row and `*_results` with a row and the responses to it.
Source: the original's `vlm-evaluation` harnesses.
"""

import re
from ast import literal_eval
from itertools import cycle, islice
from typing import Any

LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
LETTERS = ["A", "B", "C", "D"]
_IMAGE = re.compile(r"<image\s*\d+>")


def with_options(question: str, options: list[str], instruction: str) -> str:
    r"""A prompt's text."""
    lettered = [f"{chr(ord('A') + number)}. {option}" for number, option in enumerate(options)]
    return "\n".join([question, *lettered, instruction, "Answer:"])


def image_visuals(doc: dict[str, Any]) -> list:
    """The image of a row, as RGB; also where the column holds a list."""
    image = doc["image"]
    return [one.convert("RGB") for one in (image if isinstance(image, list) else [image])]


def mmbench_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict | None = None) -> str:
    """MMBench's prompt: always four options, the missing ones as `nan`, and no hint."""
    options = ["nan" if doc[letter] is None else doc[letter] for letter in LETTERS]
    return "\n" + with_options(doc["question"], options, LETTER)


def seedbench_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict | None = None) -> str:
    """SEED-Bench's prompt."""
    options = [doc[f"choice_{letter.lower()}"] for letter in LETTERS]
    return "\n" + with_options(doc["question"], options, LETTER)


def mmstar_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict | None = None) -> str:
    """MMStar's prompt; its options are part of the question."""
    return "\n" + with_options(f"Question: {doc['question']}", [], LETTER)


def ai2d_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict | None = None) -> str:
    """AI2D's prompt."""
    return "\n" + with_options(doc["question"], doc["options"], LETTER)


def ai2d_target(doc: dict[str, Any]) -> int:
    """Position of AI2D's right option."""
    return int(doc["answer"])


def question_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict | None = None) -> str:
    """POPE's and TextVQA's prompt, without OCR text; a question starts with a capital, as in LLaVA's file."""
    question = doc["question"].strip()
    return "\n" + with_options(f"Question: {question[:1].upper()}{question[1:]}", [], WORD)


def mathvista_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict | None = None) -> str:
    """MathVista's prompt, without unit or precision."""
    choices = doc["choices"] if doc["question_type"] == "multi_choice" else []
    return "\n" + with_options(doc["question"], choices, LETTER if choices else WORD)


def mmmu_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict | None = None) -> str:
    r"""MMMU's prompt, with `<image>\n` where an image stands."""
    choice = doc["question_type"] == "multiple-choice"
    # The original joins the words with a space before each, the first one included.
    subject = "".join(f" {word}" for word in doc["subfield"].split("_"))
    question = f"The following are multiple choice questions about {subject}.\n\n{doc['question']}"
    text = with_options(question, literal_eval(doc["options"]) if choice else [], LETTER if choice else WORD)
    return _IMAGE.sub("<image>\n", text)


def mmmu_visuals(doc: dict[str, Any]) -> list:
    """MMMU's images in the order of their columns, the first ones again where the prompt names more than there are."""
    images = [doc[f"image_{number}"] for number in range(1, 6)]
    images = [image.convert("RGB") for image in images if image is not None]
    return list(islice(cycle(images), mmmu_text(doc).count("<image>")))


def mmmu_messages(doc: dict[str, Any], lmms_eval_specific_kwargs: dict | None = None) -> list[dict[str, Any]]:
    """MMMU's prompt as one turn in which images and texts stand in reading order."""
    first, *others = mmmu_text(doc).split("<image>")
    content = [{"type": "text", "text": first}] if first else []
    for image, text in zip(mmmu_visuals(doc), others, strict=True):
        content += [{"type": "image", "url": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def contains_letter(answer: str, response: str) -> bool:
    """MMBench's and SEED-Bench's rule: the letter occurs anywhere, in either case (`a` is right with `a cat`)."""
    return answer.lower() in response.lower()


def letter_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score MMBench and SEED-Bench."""
    return {"accuracy": float(contains_letter(doc["answer"], results[0]))}


def mmstar_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score MMStar: the letter occurs anywhere, in upper case."""
    return {"accuracy": float(doc["answer"] in results[0])}


def ai2d_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Score AI2D: the letter with the lowest loss (models of lmms-eval give losses), the first of equals."""
    losses = [loss for loss, _ in results]
    return {"accuracy": float(losses.index(min(losses)) == ai2d_target(doc))}


def clean_word(response: str) -> str:
    """TextVQA's answer as the original scores it: lower case, one line, no comma or period."""
    return response.translate(str.maketrans("", "", "\n.,")).lower().split("<|endofchunk|>")[0]


def textvqa_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score TextVQA by M4C's soft accuracy: the mean over ten people of min(1, agreeing others / 3)."""
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    return {"accuracy": float(textvqa_process_results(doc, [clean_word(results[0])])["exact_match"])}


def mmmu_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score MMMU by its official parsing."""
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu, mmmu_process_results

    return {"accuracy": float(evaluate_mmmu([mmmu_process_results(doc, results)["mmmu_acc"]])[1]["acc"])}


def mathvista_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score MathVista: each question as an open one of MMMU's; where there are options the answer is the letter."""
    from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response

    gold = doc["answer"]
    if doc["question_type"] == "multi_choice":
        gold = chr(ord("A") + doc["choices"].index(gold))
    return {"accuracy": float(eval_open(gold, parse_open_response(results[0])))}


def pope_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Score POPE; what `mean_f1` needs is the answer, the label and the part of the benchmark."""
    answer, label = results[0].strip(",").strip(".").lower(), doc["answer"].lower()
    score = float(answer == label)
    sample = {"category": doc["category"], "prediction": answer, "answer": label, "score": score}
    return {"accuracy": score, "mean_f1": sample}


def mean_f1(samples: list[dict[str, Any]]) -> float:
    """The F1 of `yes` in each part of POPE, and their mean."""
    parts: dict[str, list[tuple[bool, bool]]] = {}
    for sample in samples:
        parts.setdefault(sample["category"], []).append((sample["prediction"] == "yes", sample["answer"] == "yes"))
    return sum(map(_f1, parts.values())) / len(parts)


def _f1(pairs: list[tuple[bool, bool]]) -> float:
    true_positives = sum(said and true for said, true in pairs)
    positives = sum(said + true for said, true in pairs)
    return 2 * true_positives / positives if positives else 0.0
