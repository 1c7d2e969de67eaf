"""The original's prompts and scoring on recorded answers, and the rules that read MathVista's without a judge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from open_qwen2vl import OpenQwen2VLProcessor
from open_qwen2vl.evaluation.prompts import PromptBuilder, user_turn
from open_qwen2vl.evaluation.tasks import answers, mathvista, paper

LETTER = "Answer with the option's letter from the given choices directly.\nAnswer:"
WORD = "Answer the question using a single word or phrase.\nAnswer:"


def test_multiple_choice_prompts():
    options = dict(zip("ABCD", ["red", "blue", "nan", None], strict=True))
    expected = "\nWhich?\nA. red\nB. blue\nC. nan\nD. nan\n" + LETTER
    # No hint: the original leaves it out.
    assert paper.mmbench_text({"question": "Which?", "hint": "Look at the sky.", **options}) == expected
    choices = {f"choice_{letter}": f"thing {letter}" for letter in "abcd"}
    expected = "\nWhich?\nA. thing a\nB. thing b\nC. thing c\nD. thing d\n" + LETTER
    assert paper.seedbench_text({"question": "Which?", **choices}) == expected
    assert paper.ai2d_text({"question": "Which?", "options": ["x", "y"]}) == "\nWhich?\nA. x\nB. y\n" + LETTER
    assert paper.mmstar_text({"question": "Which?\nOptions: A: x"}) == "\nQuestion: Which?\nOptions: A: x\n" + LETTER


def test_open_prompts():
    assert paper.question_text({"question": "what is IBM?"}) == "\nQuestion: What is IBM?\n" + WORD
    row = {"question": "How many?", "question_type": "free_form", "choices": None, "unit": "$", "precision": 1.0}
    assert paper.mathvista_text(row) == "\nHow many?\n" + WORD
    row |= {"question_type": "multi_choice", "choices": ["1", "2"]}
    assert paper.mathvista_text(row) == "\nHow many?\nA. 1\nB. 2\n" + LETTER


def mmmu_row(question: str, options: str, images: int) -> dict:
    pictures = {f"image_{n}": Image.new("L", (n, n)) if n <= images else None for n in range(1, 8)}
    kind = "multiple-choice" if options != "[]" else "open"
    return {"question": question, "options": options, "question_type": kind, "subfield": "Art_History", **pictures}


def test_mmmu_puts_images_where_the_question_names_them():
    row = mmmu_row("Is <image 1> like <image 2>?", "['yes', '<image 3>']", images=2)
    (message,) = paper.mmmu_messages(row)
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    assert texts == [
        # The space that the original puts before each word of a subject.
        "The following are multiple choice questions about  Art History.\n\nIs ",
        "\n like ",
        "\n?\nA. yes\nB. ",
        "\n\n" + LETTER,
    ]
    images = [part["url"] for part in message["content"] if part["type"] == "image"]
    # Three are named and two are there: the first one again.
    assert [image.size for image in images] == [(1, 1), (2, 2), (1, 1)]
    assert {image.mode for image in images} == {"RGB"}


def test_mmmu_ignores_images_that_no_text_names():
    row = mmmu_row("What is <image 1>?", "[]", images=3)
    assert [image.size for image in paper.mmmu_visuals(row)] == [(1, 1)]
    assert paper.mmmu_text(row).endswith("What is <image>\n?\n" + WORD)


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("A", "A", 1),
        ("A", "(a)", 1),
        # Lenient: any occurrence of the letter, also as an article or inside a word.
        ("A", "a cat", 1),
        ("D", "the red dog", 1),
        ("B", "A and B", 1),
        ("C", "A", 0),
        ("C", "", 0),
    ],
)
def test_mmbench_and_seedbench_look_for_the_letter_in_any_case(answer, response, score):
    assert paper.letter_results({"answer": answer}, [response]) == {"accuracy": score}


@pytest.mark.parametrize(("response", "score"), [("D", 1), ("Dogs", 1), ("A or D", 1), ("d", 0), ("the red dog", 0)])
def test_mmstar_looks_for_the_upper_case_letter(response, score):
    assert paper.mmstar_results({"answer": "D"}, [response]) == {"accuracy": score}


def test_raw_prompts_have_the_originals_tokens(processor, qwen_tokenizer):
    whole = OpenQwen2VLProcessor(processor.image_processor, qwen_tokenizer, image_seq_length=4)
    builder = PromptBuilder(whole, "raw")
    text = paper.ai2d_text({"question": "Which?", "options": ["x", "y", "z", "w"]})
    prompt = builder.build(user_turn([Image.new("RGB", (40, 30))], text))
    # The original tokenises what follows an image by itself.
    image = [qwen_tokenizer.convert_tokens_to_ids("<|image_pad|>")] * 4
    expected = [qwen_tokenizer.bos_token_id, *image, *qwen_tokenizer(text)["input_ids"]]
    assert builder.encode([prompt])["input_ids"][0].tolist() == expected
    # And it compares the letters' own tokens, not `:A`, which is what a text "Answer:A" ends in.
    letters = [[qwen_tokenizer.convert_tokens_to_ids(letter)] for letter in paper.LETTERS]
    assert [builder.continuation_ids(prompt, letter) for letter in paper.LETTERS] == letters


def test_ai2d_takes_the_most_probable_letter():
    losses = [(2.0, False), (0.5, False), (3.0, False), (0.5, False)]
    assert paper.ai2d_results({"answer": "1"}, losses) == {"accuracy": 1.0}
    # Of equals the first counts.
    assert paper.ai2d_results({"answer": "3"}, losses) == {"accuracy": 0.0}


def test_textvqa_drops_commas_periods_and_case():
    assert paper.clean_word("St. Mary,\nInc.") == "st maryinc"
    assert paper.clean_word("Coke<|endofchunk|>what") == "coke"


def test_pope_means_the_f1_of_its_parts():
    answers = [
        ("adversarial", "yes", "Yes."),
        ("adversarial", "no", "yes"),
        ("popular", "yes", "no"),
        ("random", "yes", "yes"),
        ("random", "no", "perhaps"),
    ]
    samples = [
        paper.pope_results({"category": part, "answer": label}, [response]) for part, label, response in answers
    ]
    assert [sample["accuracy"] for sample in samples] == [1, 0, 0, 1, 0]
    # 2/3, no true positive at all, 1.
    assert paper.mean_f1([sample["mean_f1"] for sample in samples]) == pytest.approx((2 / 3 + 0 + 1) / 3)


def math_row(kind: str, answer: str, choices: list[str] | None = None, precision: float | None = None) -> dict:
    row = {"question_type": "multi_choice" if choices else "free_form", "answer_type": kind, "answer": answer}
    return row | {"choices": choices, "precision": precision, "question": "What?", "unit": None}


def test_mathvista_prompts_are_the_suites_direct_ones():
    row = math_row("float", "1.5", precision=2.0) | {"unit": "cm"}
    assert mathvista.mathvista_text(row) == (
        "What? (Unit: cm)\nAnswer the question using a single floating-point number with two decimal places."
    )
    assert mathvista.mathvista_text(math_row("float", "1.5", precision=1.0)).endswith("with one decimal place.")
    assert mathvista.mathvista_text(math_row("integer", "1")).endswith("using a single integer number.")
    row = math_row("text", "x", choices=["x", "y"])
    assert mathvista.mathvista_text(row) == (
        "What?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."
    )


CHOICES = ["a cat", "a dog", "Yes", "3/11"]


@pytest.mark.parametrize(
    ("response", "choice"),
    [
        ("B", "a dog"),
        ("b.", "a dog"),
        ("(B) a cat", "a dog"),
        ("B: because", "a dog"),
        ("The answer is (C).", "Yes"),
        ("Answer: D", "3/11"),
        ("3/11", "3/11"),
        ("yes.", "Yes"),
        ("I think it is a dog", "a dog"),
        ("I choose B", "a dog"),
        ("It cannot be A, so it is (D) in the end", "3/11"),
        # Nothing, or not one thing.
        ("a cat or a dog", None),
        ("a bird", None),
        ("eyes", None),
        ("", None),
    ],
)
def test_mathvista_reads_an_option(response, choice):
    assert answers.read_choice(response, CHOICES) == choice


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("14", 14),
        ("about 1,200 in total", 1200),
        ("3 plus 4 makes 7", 7),
        ("The answer is 5, because 3 + 2 = 5 and not 6", 5),
        ("Answer: -2.5", -2.5),
        ("7-3", 3),
        ("$.50", 0.5),
        ("none", None),
        # Too large to be anything's answer.
        ("9" * 400, None),
    ],
)
def test_mathvista_reads_a_number(response, number):
    assert answers.read_number(response) == number


def test_mathvista_compares_numbers_at_the_rows_precision():
    assert mathvista.mathvista_results(math_row("float", "0.40", precision=2.0), ["0.4"]) == {"accuracy": 1.0}
    assert mathvista.mathvista_results(math_row("float", "0.4", precision=1.0), ["0.44"]) == {"accuracy": 1.0}
    assert mathvista.mathvista_results(math_row("float", "0.4", precision=1.0), ["0.46"]) == {"accuracy": 0.0}
    assert mathvista.mathvista_results(math_row("integer", "14"), ["14.9"]) == {"accuracy": 1.0}
    assert mathvista.mathvista_results(math_row("integer", "14"), ["I do not know"]) == {"accuracy": 0.0}


def test_mathvista_compares_lists():
    row = math_row("list", "[2007, 2008]")
    for response in (
        "[2007, 2008]",
        "The years are [2007.0, 2008].",
        "2007, 2008",
        "between 2007 and 2008",
        "2007-2008",
    ):
        assert mathvista.mathvista_results(row, [response]) == {"accuracy": 1.0}
    for response in ("[2008, 2007]", "2007", "[a, b]", f"[{10**400}]", ""):
        assert mathvista.mathvista_results(row, [response]) == {"accuracy": 0.0}


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "It is {}.", "The answer is {:,}, not 3."]))
def test_mathvista_reads_every_integer_back(number, form):
    assert mathvista.mathvista_results(math_row("integer", str(number)), [form.format(number)]) == {"accuracy": 1.0}


@given(st.lists(st.text(max_size=8), min_size=2, max_size=6), st.text(max_size=30))
def test_mathvista_reads_an_option_that_exists_or_none(choices, response):
    assert answers.read_choice(response, choices) in [*choices, None]


@given(st.text(max_size=30), st.sampled_from(["integer", "float", "list"]))
def test_mathvista_reads_any_text_without_an_error(response, kind):
    mathvista.read_answer(response, math_row(kind, "1", precision=2.0))
