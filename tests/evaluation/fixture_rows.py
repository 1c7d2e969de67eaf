"""Rows of the eight benchmarks: true columns and types, rendered images, questions of ours, recorded answers.

Columns are those of the data sets on the Hub (their cards, and what lmms-eval's tasks read). With each row stands a
model's answer and what it scores, worked out by hand, under the standard and the paper's rules; None where a row has
no score of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

LETTERS = "ABCD"


class Row(NamedTuple):
    """A row of a data set, an answer to it, and the answer's score under both rules."""

    doc: dict[str, Any]
    response: str
    standard: float | None
    paper: float | None


class Fixture(NamedTuple):
    """A benchmark: where it lies on the Hub, its columns, its rows, and its scores as lmms-eval should report them."""

    repo: str
    path: str
    config: str | None
    split: str
    columns: dict[str, Any]
    rows: list[Row]
    standard: float
    paper: float


def picture(number: int, shapes: int = 1) -> Image.Image:
    """A number of coloured squares on white, different for each number."""
    image = Image.new("RGB", (64 + 8 * (number % 3), 48), "white")
    draw = ImageDraw.Draw(image)
    for shape in range(shapes):
        color = (60 * number % 256, 90 * number % 256, 200 - 20 * number % 200)
        draw.rectangle((4 + 12 * shape, 8, 12 + 12 * shape, 24 + number), fill=color)
    return image


def _columns(text: str, **others: str) -> dict[str, str]:
    return dict.fromkeys(text.split(), "string") | others


def _mmmu() -> Fixture:
    columns = _columns(
        "id question options explanation img_type answer topic_difficulty question_type subfield",
        **{f"image_{number}": "image" for number in range(1, 8)},
    )
    shapes = "['red circle', 'blue square', 'green star', 'grey line']"
    asked = [
        ("Art_1", "<image 1> What is shown?", shapes, "B", 1, "B", 1, 1),
        ("Art_2", "What does <image 1> show?", shapes, "C", 1, "(C)", 1, 1),
        ("Math_1", "Which shape is it? <image 1>", shapes, "B", 1, "A", 0, 0),
        ("Math_2", "Which shape is it? <image 1>", shapes, "B", 1, "I would say that it is the blue square", 1, 1),
        ("Math_3", "<image 1> and <image 2>: which shape is in both?", shapes, "D", 2, "Answer: D", 1, 1),
        ("Music_1", "Which note is higher?", "['<image 1>', '<image 2>']", "A", 2, "A", 1, 1),
        ("Music_2", "How many squares does <image 1> have?", "[]", "3", 1, "3", 1, 1),
        ("Physics_1", "How long is the line in <image 1>?", "[]", "3.5", 1, "3.5", 1, 0),
    ]
    rows = []
    for number, (name, question, options, answer, images, response, standard, paper) in enumerate(asked):
        doc = {
            "id": f"validation_{name}",
            "question": question,
            "options": options,
            "explanation": "",
            "img_type": "['Diagrams']",
            "answer": answer,
            "topic_difficulty": "Easy",
            "question_type": "open" if options == "[]" else "multiple-choice",
            "subfield": "Drawing and Painting",
        } | {f"image_{n}": picture(number + n) if n <= images else None for n in range(1, 8)}
        rows.append(Row(doc, response, standard, paper))
    path = "data/validation-00000-of-00001.parquet"
    return Fixture("lmms-lab-encoder/MMMU", path, None, "validation", columns, rows, 7 / 8, 6 / 8)


def _rotations(number: int, question: str, options: list[str]) -> list[dict[str, Any]]:
    """A question, whose first option is right, and its options shifted by one, two, ..., as MMBench stores them."""
    docs = []
    for shift in range(len(options)):
        shifted = options[len(options) - shift :] + options[: len(options) - shift] + ["nan"] * (4 - len(options))
        docs.append(
            {
                "index": number + 1_000_000 * shift,
                "question": question,
                "hint": "nan",
                "answer": LETTERS[shift],
                "category": ["object_localization", "attribute_recognition"][number % 2],
                "image": picture(number),
                "source": "made",
                "L2-category": "finegrained_perception (instance-level)",
                "comment": "nan",
                "split": "dev",
            }
            | dict(zip(LETTERS, shifted, strict=True))
        )
    return docs


def _mmbench() -> Fixture:
    text = "question hint answer A B C D category source L2-category comment split"
    asked = [
        # Every rotation right, in the usual forms.
        (["a cat", "a dog", "a fox", "an owl"], ["A", "B.", "(C)", "D"], [1, None, None, None], [1, 1, 1, 1]),
        # One rotation wrong: the question is lost under CircularEval.
        (["yes", "no"], ["A", "A"], [0, None], [1, 0]),
        # The option's text instead of the letter: the paper's rule finds no letter in it.
        (["red", "blue"], ["red", "red"], [1, None], [0, 0]),
        # The substring rule takes the article for the letter.
        (["a cat", "a dog"], ["a cat", "a dog"], [0, None], [1, 0]),
    ]
    rows = []
    for number, (options, responses, standard, paper) in enumerate(asked):
        docs = _rotations(number, "What is in the picture?", options)
        rows += [Row(*row) for row in zip(docs, responses, standard, paper, strict=True)]
    columns = _columns(text, index="int64", image="image")
    return Fixture(
        "lmms-lab-encoder/MMBench", "en/dev-00000-of-00001.parquet", "en", "dev", columns, rows, 50.0, 6 / 10
    )


def _seedbench() -> Fixture:
    text = "answer choice_a choice_b choice_c choice_d data_id data_type question question_id"
    columns = _columns(text, image="images", question_type_id="int16", segment="integers")
    asked = [
        ("A", "A", 1, 1),
        ("A", "A. the cat", 1, 1),
        ("B", "b", 1, 1),
        ("C", "The answer is C", 0, 1),
        ("D", "the dog", 0, 1),
        ("A", "D", 0, 0),
        ("A", "cat", 0, 1),
        ("B", "B", 1, 1),
        ("A", "never asked", None, None),
        ("B", "never asked", None, None),
    ]
    rows = []
    for number, (answer, response, standard, paper) in enumerate(asked):
        video = standard is None
        doc = {
            "answer": answer,
            "data_id": f"{number}.jpg",
            "data_type": "video" if video else "image",
            "question": "What is in the middle?",
            "question_id": str(number),
            "question_type_id": 10 if video else 1 + number,
            "image": [picture(number)] * (8 if video else 1),
            "segment": [0, 8] if video else None,
        } | {f"choice_{letter.lower()}": f"thing {letter}" for letter in LETTERS}
        rows.append(Row(doc, response, standard, paper))
    path = "data/test-00000-of-00001.parquet"
    return Fixture("lmms-lab-encoder/SEED-Bench", path, None, "test", columns, rows, 4 / 8, 7 / 8)


def _mmstar() -> Fixture:
    columns = _columns("question answer category l2_category", index="int64", image="image", meta_info="mmstar_info")
    asked = [
        ("coarse perception", "image emotion", "A", "A", 1, 1),
        ("coarse perception", "image emotion", "A", "B", 0, 0),
        ("fine-grained perception", "object counting", "C", "C: 3", 1, 1),
        ("instance reasoning", "single-instance reasoning", "D", "the answer is d", 0, 0),
        ("logical reasoning", "diagram reasoning", "B", "A or B", 0, 1),
        ("science & technology", "electronics & energy & mechanical eng.", "D", "Dogs", 1, 1),
        ("math", "geometry", "B", "B", 1, 1),
        ("math", "numeric commonsense and calculation", "D", "C", 0, 0),
        ("math", "geometry", "C", "A", 0, 0),
    ]
    rows = []
    for number, (category, finer, answer, response, standard, paper) in enumerate(asked):
        doc = {
            "index": number,
            "question": "What is it?\nOptions: A: a cat, B: a dog, C: a fox, D: an owl",
            "image": picture(number),
            "answer": answer,
            "category": category,
            "l2_category": finer,
            "meta_info": {"source": "made", "split": "val", "image_path": f"images/{number}.jpg"},
        }
        rows.append(Row(doc, response, standard, paper))
    # Seven finer categories: 1/2, 1, 0, 0, 1, 1/2, 0.
    return Fixture("Lin-Chen/MMStar", "mmstar.parquet", "val", "val", columns, rows, 3 / 7, 5 / 9)


def _ai2d() -> Fixture:
    columns = _columns("question answer", options="strings", image="image")
    asked = [
        ("0", "A", 1, 1),
        ("1", "B.", 1, 1),
        ("1", "b", 1, 1),
        ("2", "C because of the tail", 0, 1),
        ("3", "D", 1, 1),
        ("1", "A", 0, 0),
        ("2", "(C)", 1, 1),
        ("1", "the second", 0, 0),
    ]
    rows = []
    for number, (answer, response, standard, paper) in enumerate(asked):
        doc = {"question": "What eats the plant?", "options": ["fox", "hare", "owl", "snail"], "answer": answer}
        rows.append(Row(doc | {"image": picture(number)}, response, standard, paper))
    path = "data/test-00000-of-00001.parquet"
    return Fixture("lmms-lab-encoder/ai2d", path, None, "test", columns, rows, 5 / 8, 6 / 8)


def _textvqa() -> Fixture:
    columns = _columns(
        "image_id question flickr_original_url flickr_300k_url set_name",
        question_id="int32",
        question_tokens="strings",
        image="image",
        image_width="int32",
        image_height="int32",
        answers="strings",
        image_classes="strings",
        ocr_tokens="strings",
    )
    others = [f"other {number}" for number in range(10)]
    asked = [
        (["nokia"] * 10, "Nokia", 1, 1),
        # Two of ten: 2 * 1/3 + 8 * 2/3, over 10.
        (["stop"] * 2 + others[:8], "stop", 0.6, 0.6),
        # The original stops at the period.
        (["5.99"] * 10, "5.99", 1, 0),
        (["10"] * 10, "ten", 1, 1),
        (["coca cola"] * 10, "The Coca-Cola", 1, 1),
        (["pepsi"] * 10, "unanswerable", 0, 0),
        (["sprite"] * 10, "sprite, coke", 0, 1),
        # Three of ten: 3 * 2/3 + 7 * 1, over 10.
        (["left"] * 3 + others[:7], "left", 0.9, 0.9),
        (["blue"] * 10, "blue\nand more", 0, 1),
    ]
    rows = []
    for number, (answers, response, standard, paper) in enumerate(asked):
        image = picture(number)
        doc = {
            "image_id": f"{number:016x}",
            "question_id": 34602 + number,
            "question": "what is written on the sign?",
            "question_tokens": "what is written on the sign".split(),
            "image": image,
            "image_width": image.width,
            "image_height": image.height,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "answers": answers,
            "image_classes": ["Sign"],
            "set_name": "val",
            "ocr_tokens": ["STOP"],
        }
        rows.append(Row(doc, response, standard, paper))
    path = "data/validation-00000-of-00001.parquet"
    return Fixture("lmms-lab-encoder/textvqa", path, None, "validation", columns, rows, 5.5 / 9, 6.5 / 9)


def _mathvista() -> Fixture:
    columns = _columns(
        "pid question image unit answer question_type answer_type query",
        decoded_image="image",
        choices="strings",
        precision="float64",
        metadata="mathvista_metadata",
    )
    asked = [
        ("text", ["3/11", "8/11"], None, "8/11", "B", 1, 1),
        # The letter is what the original compares with.
        ("text", ["Yes", "No"], None, "No", "No", 1, 0),
        ("text", ["bar", "line", "pie"], None, "pie", "The answer is (C) pie", 1, 0),
        ("integer", None, None, "14", "14", 1, 1),
        ("integer", None, None, "1200", "It is 1,200 in total", 1, 0),
        ("float", None, 1.0, "0.6", "0.62", 1, 0),
        ("float", None, 2.0, "1.45", "1.54", 0, 0),
        ("list", None, None, "[2007, 2008]", "[2007, 2008]", 1, 0),
        # Open scoring looks for the letter between spaces.
        ("text", ["cat", "dog"], None, "dog", "a b c", 0, 1),
    ]
    rows = []
    for number, (kind, choices, precision, answer, response, standard, paper) in enumerate(asked):
        image = picture(number)
        metadata = {
            "category": "math-targeted-vqa",
            "context": "synthetic scene",
            "grade": "daily life",
            "img_height": image.height,
            "img_width": image.width,
            "language": "english",
            "skills": ["arithmetic reasoning"],
            "source": "made",
            "split": "testmini",
            "task": ["figure question answering", "math word problem"][number % 2],
        }
        doc = {
            "pid": str(number + 1),
            "question": "What is shown?",
            "image": f"images/{number + 1}.jpg",
            "decoded_image": image,
            "choices": choices,
            "unit": "$" if number == 3 else None,
            "precision": precision,
            "answer": answer,
            "question_type": "multi_choice" if choices else "free_form",
            "answer_type": kind,
            "metadata": metadata,
            "query": "Hint: Please answer the question.\nQuestion: What is shown?",
        }
        rows.append(Row(doc, response, standard, paper))
    path = "data/testmini-00000-of-00001-725687bf7a18d64b.parquet"
    return Fixture("AI4Math/MathVista", path, None, "testmini", columns, rows, 7 / 9, 3 / 9)


def _pope() -> Fixture:
    columns = _columns("id question_id question answer image_source category", image="image")
    asked = [
        ("adversarial", "yes", "Yes", 1, 1),
        ("adversarial", "no", "Yes", 0, 0),
        ("adversarial", "yes", "No", 0, 0),
        ("popular", "yes", "yes.", 0, 1),
        ("popular", "no", "no", 1, 1),
        ("popular", "yes", "yes", 1, 1),
        ("random", "no", "no", 1, 1),
        ("random", "no", "Yes", 0, 0),
        ("random", "yes", "Yes, there is", 0, 1),
    ]
    rows = []
    for number, (category, answer, response, standard, paper) in enumerate(asked):
        doc = {
            "id": str(number),
            "question_id": str(1 + number % 3),
            "question": "Is there a red square in the image?",
            "answer": answer,
            "image_source": f"COCO_val2014_{number:012d}",
            "image": picture(number),
            "category": category,
        }
        rows.append(Row(doc, response, standard, paper))
    # Standard: 2 true and 2 false positives, 1 missed: precision 1/2, recall 2/3. Paper: F1 of 1/2, 1 and 2/3.
    path = "data/test-00000-of-00001.parquet"
    return Fixture("lmms-lab-encoder/POPE", path, None, "test", columns, rows, 4 / 7, 13 / 18)


_MAKERS: dict[str, Callable[[], Fixture]] = {
    "mmmu_val": _mmmu,
    "mmbench_en_dev_static": _mmbench,
    "seedbench": _seedbench,
    "mmstar": _mmstar,
    "ai2d": _ai2d,
    "textvqa_val": _textvqa,
    "mathvista": _mathvista,
    "pope": _pope,
}


def benchmark_fixtures() -> dict[str, Fixture]:
    """The eight, by the names that users write."""
    return {name: make() for name, make in _MAKERS.items()}
