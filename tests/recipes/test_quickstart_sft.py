"""The second half of the quickstart: easy-VQA as conversations, the evaluation, the report."""

import importlib.metadata
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "quickstart"))

import build_backbones  # noqa: E402
import build_sft_data  # noqa: E402
import report_sft  # noqa: E402
import report_sft_pages  # noqa: E402

VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twelve pictures of each split with all their questions."""
    folder = tmp_path_factory.mktemp("sft") / "data"
    build_sft_data.build(folder, limit=12, seed=2)
    return folder


@pytest.fixture(scope="module")
def model_and_processor(tmp_path_factory):
    """A random model of a few thousand parameters."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    tokenizer = build_backbones.train_tokenizer(["what color is the shape?", "is there a red shape in the image?"])
    build_backbones.save_vision(folder / "vision", VISION)
    build_backbones.save_text(folder / "text", TEXT, tokenizer)
    backbones = str(folder / "vision"), str(folder / "text")
    processor = OpenQwen2VLProcessor.from_vision_text_pretrained(*backbones, image_seq_length=16)
    return OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(*backbones, 16), processor


def read_records(data: Path, split: str) -> list[dict]:
    return [record for file in sorted(data.glob(f"{split}*.json")) for record in json.loads(file.read_text())]


def read_pixels(folder: Path) -> set[bytes]:
    pixels = set()
    for path in folder.iterdir():
        with Image.open(path) as image:
            pixels.add(image.convert("RGB").tobytes())
    return pixels


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_question_is_a_conversation(data, split):
    records = read_records(data, split)
    asked = Counter()
    for record in records:
        question, answer = record["conversations"]
        assert (question["from"], answer["from"]) == ("human", "gpt")
        assert question["value"].startswith("<image>\n") and (data / "images" / record["image"]).is_file()
        asked[record["image"], question["value"].removeprefix("<image>\n"), answer["value"]] += 1
    assert len({record["id"] for record in records}) == len(records)
    source = zip(*build_sft_data.SPLITS[split][0](), strict=True)
    assert asked == Counter(
        (f"{split}/{image}.png", question, answer) for question, answer, image in source if image < 12
    )


def test_questions_for_a_shape_are_a_file(data):
    for name, kinds in (("train-shapes", {"shape"}), ("train-others", {"color", "yes_no_color", "yes_no_shape"})):
        questions = report_sft.read_questions(data / f"{name}.json", data / "images")
        assert {question.kind for question in questions} == kinds
        # A picture's questions stand together.
        pictures = [question.picture for question in questions]
        assert len(set(pictures)) == 1 + sum(one != other for one, other in zip(pictures, pictures[1:], strict=False))


def test_no_test_picture_is_trained_on(data):
    train, test = (read_pixels(data / "images" / split) for split in ("train", "test"))
    assert len(train) == len(test) == 12 and not train & test
    images = {split: {record["image"] for record in read_records(data, split)} for split in ("train", "test")}
    assert all(name.startswith("train/") for name in images["train"])
    assert all(name.startswith("test/") for name in images["test"])


def test_the_whole_set_has_its_published_size():
    counts = {split: build_sft_data.questions_by_image(split) for split in ("train", "test")}
    assert {split: len(images) for split, images in counts.items()} == {"train": 4000, "test": 1000}
    assert {split: sum(map(len, images.values())) for split, images in counts.items()} == {
        "train": 38575,
        "test": 9673,
    }


def test_choices_are_made_on_training_pictures(tmp_path):
    """`--validation` splits easy-VQA's training split, and copies nothing of its test split."""
    learnt, asked = (build_sft_data.questions_by_image(split, validation=True) for split in ("train", "test"))
    assert (len(learnt), len(asked)) == (3500, 500)
    assert learnt | asked == build_sft_data.questions_by_image("train") and not learnt.keys() & asked.keys()
    build_sft_data.build(tmp_path / "data", limit=3, validation=True)
    source = build_sft_data.SPLITS["train"][1]()
    for image in list(asked)[:3]:
        assert (tmp_path / f"data/images/test/{image}.png").read_bytes() == Path(source[image]).read_bytes()


def test_data_is_a_function_of_its_options(data, tmp_path):
    summary = json.loads((data / "corpus.json").read_text())
    assert build_sft_data.build(tmp_path / "again", limit=12, seed=2) == summary
    for name in ("train-shapes.json", "train-others.json", "test.json", "corpus.json"):
        assert (data / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    build_sft_data.build(tmp_path / "other", limit=12, seed=3)
    assert read_records(data, "train") != read_records(tmp_path / "other", "train")
    assert not list(data.parent.glob("*.partial"))


def test_finished_data_is_left_alone(data):
    before = {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    build_sft_data.build(data, limit=12, seed=2)
    assert {path.name: path.stat().st_mtime_ns for path in data.iterdir()} == before
    with pytest.raises(ValueError, match="was made with"):
        build_sft_data.build(data, limit=12, seed=3)


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("what color is the shape?", "color"),
        ("what is the color of the triangle?", "color"),
        ("what is the blue shape?", "shape"),
        ("what shape is present?", "shape"),
        ("is there not a teal shape?", "yes_no_color"),
        ("does the image contain a rectangle?", "yes_no_shape"),
    ],
)
def test_types_of_questions(question, kind):
    assert report_sft.Question(Path(), question, "").kind == kind


def test_the_type_decides_the_answers():
    answers = {}
    for pairs in build_sft_data.questions_by_image("train").values():
        for question, answer in pairs:
            answers.setdefault(report_sft.Question(Path(), question, answer).kind, set()).add(answer)
    shapes = {"circle", "rectangle", "triangle"}
    yes_no = {"yes", "no"}
    assert answers == {
        "color": set(report_sft.COLORS), "shape": shapes, "yes_no_color": yes_no, "yes_no_shape": yes_no,
    }  # fmt: skip


def test_majority_is_learnt_from_training_by_type():
    def questions(*pairs):
        return [report_sft.Question(Path(), *pair) for pair in pairs]

    train = questions(
        ("what color is the shape?", "red"),
        ("what is the color of the circle?", "red"),
        ("what color is the circle?", "blue"),
        ("is there a red shape?", "no"),
    )
    test = questions(
        ("what color is the circle?", "blue"), ("what color is the shape?", "red"), ("is a teal shape present?", "no")
    )
    answered = report_sft.answer_by_majority(train, test)
    assert [question.generated for question in answered] == ["red", "red", "no"]
    assert report_sft.accuracy(answered) == pytest.approx(2 / 3)
    assert report_sft.accuracy_by_type(answered) == {"color": 0.5, "yes_no_color": 1.0}


def test_prompt_is_the_beginning_of_a_training_conversation(data, model_and_processor):
    model, processor = model_and_processor
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    image = Image.new("RGB", (9, 9))
    answers = report_sft.answer_batch(model, processor, [image, image], ["what color is the shape?", "is there?"])
    handle.remove()
    assert len(answers) == 2
    # As `<image>\nquestion` is read from train-*.json: the newline stays with the text.
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat color is the shape?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    document = processor(images=[image], text=processor.apply_chat_template(messages))["input_ids"][0]
    prompt = seen[0][0].tolist()
    assert document[: len(prompt)] == prompt
    assert processor.tokenizer.decode(document[len(prompt) :]) == "red<|im_end|>\n"
    # The shorter prompt is padded on the left, where generation does not look.
    assert seen[0][1, 0] == processor.tokenizer.pad_token_id


def test_blanked_answers_do_not_depend_on_the_picture(data, model_and_processor):
    model, processor = model_and_processor
    questions = report_sft.read_questions(data / "test.json", data / "images")
    blanked = report_sft.answer_blanked(model, processor, questions, batch_size=16)
    assert [(q.picture, q.question, q.answer) for q in blanked] == [
        (q.picture, q.question, q.answer) for q in questions
    ]
    by_wording = {}
    for question in blanked:
        by_wording.setdefault(question.question, set()).add(question.generated)
    assert len(by_wording) < len(questions)
    assert all(len(answers) == 1 for answers in by_wording.values())
    grey = report_sft.grey_picture(questions[0].picture)
    assert (grey.size, grey.getcolors()) == ((64, 64), [(64 * 64, (128, 128, 128))])


def test_report_of_a_model(data, model_and_processor, tmp_path):
    model, processor = model_and_processor
    (tmp_path / "data").symlink_to(data)
    with pytest.raises(ValueError, match=r"train_results.json is missing: run sft.py first"):
        report_sft.build(tmp_path)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    training = {"train_seconds": 61.0, "steps": 20, "epochs": 2.0, "tokens_per_second": 1234.5, "final_loss": 0.5}
    (tmp_path / "train_results.json").write_text(json.dumps(training))
    metrics = report_sft.build(tmp_path, batch_size=32)

    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["questions"] == len(read_records(data, "test")) == sum(metrics["questions_by_type"].values())
    for prefix in ("", "majority_", "blanked_"):
        by_type = metrics[f"{prefix}by_type"]
        assert set(by_type) == set(report_sft_pages.TYPES)
        total = sum(by_type[kind] * count for kind, count in metrics["questions_by_type"].items())
        assert metrics[f"{prefix}accuracy"] == pytest.approx(total / metrics["questions"])
    # A random model knows no answer; the commonest one is right now and then.
    assert metrics["accuracy"] < 0.1 < metrics["majority_accuracy"] < 0.8
    assert metrics["versions"]["easy-vqa"] == importlib.metadata.version("easy-vqa")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    with Image.open(tmp_path / "report.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 1000


def test_pages_escape_text_and_load_nothing(data, tmp_path):
    evil = "<script>alert('$x$ & ${y}')</script>"
    picture = data / "images/test/0.png"
    right, wrong = (report_sft.Question(picture, evil, evil, said) for said in (evil, f"<img src=x>{evil}"))
    by_type = {right.kind: 0.5}
    metrics = {
        "accuracy": 0.5,
        "majority_accuracy": 0.25,
        "blanked_accuracy": 0.25,
        "by_type": by_type,
        "majority_by_type": by_type,
        "blanked_by_type": by_type,
        "questions_by_type": {right.kind: 2},
        "questions": 2,
        "train_questions": 9,
        "train_images": 3,
        "train_seconds": 61.0,
        "steps": 20,
        "epochs": 2.0,
        "tokens_per_second": 1234.5,
        "parameters": 4_000_000,
        "machine": {"processor": "<b>"},
        "versions": {},
    }
    report_sft_pages.write_html(tmp_path / "report.html", metrics, [right, wrong])
    report_sft_pages.write_png(tmp_path / "report.png", metrics, [right, wrong])
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "src=x" not in page.replace("&lt;img src=x&gt;", "") and "<td><b>" not in page
    assert "&lt;script&gt;alert(&#x27;$x$ &amp; ${y}&#x27;)&lt;/script&gt;" in page
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert "url(" not in page and "<link" not in page
    assert "Victor Zhou" in page and sorted(os.listdir(tmp_path)) == ["report.html", "report.png"]
