r"""Readers of answers, on some 200 plain answers of each kind: what MathVista's rules read, and lmms-eval's beside it.

Answers are made from forms that models write (bold, LaTeX, a reason behind, a unit), so that the right value of each
is known. MathVista's must all be read. The other benchmarks keep lmms-eval's own readers, or the original's under the
paper's rules: for these the test says which forms they read, so that a change of either is noticed.
"""

import time

import pytest

from open_qwen2vl.evaluation.tasks import paper
from open_qwen2vl.evaluation.tasks.answers import read_choice, read_list, read_number

LETTERS = "ABCD"
CHOICES = {
    "animals": ["a cat", "the red dog", "a bird", "a red dog's house"],
    "numbers": ["10", "2.5", "105", "-3"],
    "units": ["5 cm", "7 cm^2", r"$\frac{3}{5}$", "1,200 m"],
    "words": ["Yes", "No", "light blue", "blue"],
}
LETTER_FORMS = [
    "{}",
    "{}.",
    "({})",
    "{})",
    "{}: {text}",
    "{}. {text}",
    "({}) {text}",
    "**{}**",
    "**{}.** {text}",
    r"\boxed{{{}}}",
    r"$\boxed{{\text{{{}}}}}$",
    "${}$",
    "`{}`",
    "{}\nExplanation: {other} is seen, not {text}.",
    "{}\n\nBecause {other} is behind.",
    "The answer is {}",
    "The answer is {}.",
    "The answer is ({}).",
    "The answer is **{}**.",
    "The answer is {} because A is wrong",
    "The answer is {}, not C.",
    "Answer: {}",
    "**Answer:** {}",
    "Answer: ({}) {text}",
    "Final answer: **{}**",
    "The correct option is {}.",
    "The correct answer is option {}: {text}",
    "Option {}",
    "I would choose {}.",
    "I choose option {} as A is wrong",
    "{} is correct because {other} is not there",
    "A is wrong and so is C. The answer is {}.",
    "Let me think. {other} does not fit.\nSo the answer is\n{}",
    "It cannot be {wrong}, so it is ({}) in the end",
    "'{}'",
]
TEXT_FORMS = [
    "{text}",
    "{text}.",
    "**{text}**",
    '"{text}"',
    "The answer is {text}",
    "The answer is {text}.",
    "Answer: {text}",
    "The answer is {text} because it is so",
    r"\boxed{{{text}}}",
]
VALUES = [0, 5, 7, 14, 100, 1200, -5, -12, 2.5, -0.75, 0.6, 10.5]
NUMBER_FORMS = [
    "{}",
    "{}.",
    "{} cm",
    "{} cm^2",
    "{} cm²",
    "{}%",
    "${}$",
    "**{}**",
    r"\boxed{{{}}}",
    r"$\boxed{{{}\text{{ cm}}^2}}$",
    "x = {}",
    "The answer is {}",
    "The answer is {}.",
    "The answer is {}, because 3 + 2 makes more than 1",
    "The answer is: {}",
    "Answer: {} square meters (m^2)",
    "The answer is x = {}.",
    "3 of 17 are left.\nAnswer: {}",
    "{}\nThere are 3 groups in 2 rows.",
    "So 2 and 3 give {}",
]


def letter_answers():
    for name, choices in CHOICES.items():
        for number, text in enumerate(choices):
            own = {"text": text, "other": choices[number - 1], "wrong": LETTERS[number - 1]}
            for form in LETTER_FORMS:
                yield name, form.format(LETTERS[number], **own), text
            for form in TEXT_FORMS:
                yield name, form.format(**own), text


def test_every_plain_answer_names_its_option():
    answers = list(letter_answers())
    assert len(answers) > 600
    wrong = [(answer, choice, got) for name, answer, choice in answers
             if (got := read_choice(answer, CHOICES[name])) != choice]  # fmt: skip
    assert wrong == []


def test_every_plain_number_is_read():
    answers = [(form.format(value), float(value)) for value in VALUES for form in NUMBER_FORMS]
    answers += [(text.replace("-", "\u2212"), value) for text, value in answers if "-" in text]
    assert len(answers) > 240
    assert [(text, value, got) for text, value in answers if (got := read_number(text)) != value] == []


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("x = - 5", -5),
        ("The answer is - 5", -5),
        ("\u2212 5", -5),
        ("minus 5", -5),
        ("3/5", 0.6),
        ("-3/5", -0.6),
        ("2 1/2", 2.5),
        (r"\frac{3}{5}", 0.6),
        (r"The answer is $-\dfrac{1}{4}$.", -0.25),
        ("1.2 x 10^3", 1200),
        (r"1.2 \times 10^{3}", 1200),
        ("1.2 \u00d7 10^-3", 0.0012),
        ("1.2*10^3 J", 1200),
        ("1.2e3", 1200),
        ("1,200.5", 1200.5),
        ("The answer is 3 + 4 = 7.", 7),
        ("3 + 4 = 7", 7),
        ("CO2 and H2O: 4", 4),
        ("area in cm2: 9", 9),
        ("two", 2),
        ("Twenty-one.", 21),
        ("thirty", 30),
        ("2\u00bd", 2.5),
        ("10^3", 1000),
        ("10\u00b3", 1000),
        ("1.2\u00d710\u207b\u00b3", 0.0012),
        ("2\u221a3", 2 * 3**0.5),
        (r"The answer is $5\sqrt{2}$ cm", 5 * 2**0.5),
        ("The gap is 12 years (1950 - 1938).", 12),
        ("2 and 3 give (5)", 5),
        ("<think>It is 3? No.</think>\n\n<answer>7</answer>", 7),
        ("\uff11\uff12", 12),
        ("9^99999", None),
        ("5/0", None),
        ("1e999", None),
        ("nothing", None),
    ],
)
def test_other_ways_to_write_a_number(response, number):
    assert read_number(response) == (None if number is None else pytest.approx(number))


@pytest.mark.parametrize(
    ("response", "choices", "choice"),
    [
        ("about 10.5", ["10", "11"], None),
        ("The answer is 2.5", ["5", "2"], None),
        ("The answer is 2.5", ["5", "2.5"], "2.5"),
        ("-10", ["10", "20"], None),
        ("10", ["10 cm", "20 cm"], "10 cm"),
        ("1,050", ["1", "50", "1,050"], "1,050"),
        ("A cat", ["a dog", "a cat"], "a cat"),
        ("The answer is a cat", ["a dog", "a cat"], "a cat"),
        ("A red one", ["blue", "green"], None),
        ("the light blue one", ["blue", "light blue"], "light blue"),
        ("The answer is not B, it is C", ["x", "y", "z"], "z"),
        ("3/110", ["3/11", "8/11"], None),
        ("A or B", ["x", "y", "z"], None),
        ("Either A or B", ["x", "y", "z"], None),
        ("B or maybe C", ["x", "y", "z"], None),
        ("A and B", ["x", "y", "z"], None),
    ],
)
def test_an_option_inside_another_number_or_word_is_not_named(response, choices, choice):
    assert read_choice(response, choices) == choice


@pytest.mark.parametrize(
    "answer",
    [
        "Option A is wrong. Option C is clearly wrong. So B.",
        "A is wrong. B",
        "Option C can be ruled out, and A is not right either. The answer is B",
        "A and C are wrong, so the answer is B.",
        "The answer cannot be A, so B",
        "The answer isn't A but B",
        "B!",
        "<answer>B</answer>",
        "<think>The answer is A? No.</think>\n<answer>B</answer>",
        "{B}",
        "*B*",
        "_B_",
        "Answer\uff1aB",
        "\uff22",
        "B\u200b",
    ],
)
def test_letters_that_are_denied_and_other_marks(answer):
    assert read_choice(answer, ["x", "y", "z"]) == "y"


@pytest.mark.parametrize("unit", ["answer is ", "9", "(A ", "<think>"])
def test_a_model_that_repeats_itself_costs_no_time(unit):
    """Searches that look again at all that follows took minutes; a limit is against hanging only."""
    start = time.process_time()
    for read in (read_number, read_list, lambda text: read_choice(text, ["x", "y"])):
        read(unit * (40_000 // len(unit)))
    assert time.process_time() - start < 30


def test_lists():
    assert read_list("[\u22121, 2]") == [-1, 2]
    assert read_list(r"The answer is \boxed{[1, 2.5]}") == [1, 2.5]
    assert read_list("[" * 5000) is None


def score(name: str, rules: str, doc: dict, response: str) -> float:
    """What the reader of a benchmark gives one answer, by lmms-eval's own functions or the original's rules."""
    if rules == "paper":
        function = {"mmstar": paper.mmstar_results, "pope": paper.pope_results, "textvqa_val": paper.textvqa_results}
        function |= {"mmmu_val": paper.mmmu_results}
        return function.get(name, paper.letter_results)(doc, [response])["accuracy"]
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu, mmmu_process_results
    from lmms_eval.tasks.mmstar.utils import mmstar_process_results
    from lmms_eval.tasks.pope.utils import pope_process_results
    from lmms_eval.tasks.seedbench.utils import seed_aggregation_result, seed_process_result
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    if name == "mmmu_val":
        return evaluate_mmmu([mmmu_process_results(doc, [response])["mmmu_acc"]])[1]["acc"]
    if name == "seedbench":
        return seed_aggregation_result([seed_process_result(doc, [response])["seed_image"]])
    if name == "mmstar":
        return mmstar_process_results(doc, [response])["average"]["score"]
    if name == "pope":
        return pope_process_results(doc, [response])["pope_accuracy"]["score"]
    return textvqa_process_results(doc, [response])["exact_match"]


YES_FORMS = ["{}", "{}.", "**{}**", "{}, yes", "The answer is {}", r"\boxed{{{}}}", "{}\n", " {}", "{} it is"]
WORD_FORMS = [*YES_FORMS, "{}\nExplanation: it is.", "It says {}", '"{}"']
# Forms that a benchmark's own reader does not read: its published numbers are made with it, so it stays.
REASONED = {"The answer is {} because A is wrong", "The answer is {}, not C.", "I choose option {} as A is wrong"}
UNREAD = {
    ("mmstar", "standard"): REASONED | {"A is wrong and so is C. The answer is {}."},
    ("mmstar", "paper"): set(),
    ("seedbench", "standard"): {form for form in LETTER_FORMS if not form.startswith("{}")},
    ("seedbench", "paper"): set(),
    ("pope", "standard"): set(YES_FORMS) - {"{}", "{}\n", " {}"},
    ("pope", "paper"): set(YES_FORMS) - {"{}", "{}."},
    ("textvqa_val", "standard"): set(WORD_FORMS) - {"{}", "{}.", "{}\n", " {}", '"{}"'},
    ("textvqa_val", "paper"): set(WORD_FORMS) - {"{}", "{}.", "{}\n", " {}", '"{}"'},
}


def recorded(name: str) -> list[tuple[str, str, dict]]:
    """(form, answer, row) of a benchmark, some 100 of each, where the answer is the right one."""
    row = {"question_id": 1, "index": 1, "data_type": "image", "category": "random", "l2_category": "any"}
    if name == "pope":
        words = [word for word in ("yes", "no", "Yes", "No", "YES", "NO")] * 4
        return [(form, form.format(word), row | {"answer": word.lower()}) for form in YES_FORMS for word in words]
    if name == "textvqa_val":
        words = ["coke", "Pepsi", "12", "main street", "st. mary", "nokia"] * 3
        return [(form, form.format(word), row | {"answers": [word] * 10}) for form in WORD_FORMS for word in words]
    found = []
    for choices in (CHOICES["animals"], CHOICES["words"]):
        for number in (1, 2, 3):
            own = {"text": choices[number], "other": choices[number - 1], "wrong": LETTERS[number - 1]}
            own_row = row | {"answer": LETTERS[number]}
            found += [(form, form.format(LETTERS[number], **own), own_row) for form in LETTER_FORMS]
    return found


@pytest.mark.parametrize(("name", "rules"), list(UNREAD))
def test_the_other_benchmarks_readers_read_what_they_always_did(name, rules):
    answers = recorded(name)
    assert len(answers) >= 200
    unread = {form for form, answer, row in answers if not score(name, rules, dict(row), answer)}
    assert unread == UNREAD[name, rules]


def test_mmmu_reads_open_answers_and_the_usual_letters():
    """Where it finds no letter it takes a random one, so that only what it reads can be named."""
    row = {"id": "validation_Art_1", "question_type": "open", "options": "[]"}
    numbers = [(form, form.format(value), row | {"answer": str(value)}) for value in VALUES for form in NUMBER_FORMS]
    letters = [
        (form, answer, doc | row | {"question_type": "multiple-choice", "options": str(CHOICES["animals"])})
        for form, answer, doc in recorded("mmmu_val")[: 3 * len(LETTER_FORMS)]
    ]
    read = {"{}", "{}.", "({})", "{}. {text}", "The answer is {}.", "The answer is ({}).", "Answer: {}", "Option {}"}
    for rules in ("standard", "paper"):
        unread = {form for form, answer, doc in numbers if not score("mmmu_val", rules, doc, answer)}
        assert unread == {"The answer is {}, because 3 + 2 makes more than 1"}
        assert all(score("mmmu_val", rules, doc, answer) for form, answer, doc in letters if form in read)
