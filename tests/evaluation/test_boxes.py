"""Boxes in an evaluation: read in the family's form, scored, kept in pixels, and drawn in the report."""

import io
import json
import shutil
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedModel

from open_qwen2vl.evaluation.boxes import ANSWER_COLORS, TRUE_COLOR, boxes_line, draw_answers, read_boxes_line
from open_qwen2vl.evaluation.evaluate import evaluate_loaded
from open_qwen2vl.evaluation.generation import load_model
from open_qwen2vl.evaluation.report import write_report
from open_qwen2vl.evaluation.report.folders import load_evaluations
from open_qwen2vl.evaluation.report.samples import ImageStore, choose_samples
from open_qwen2vl.grounding import Box
from open_qwen2vl.grounding.questions import REFERRING

RECIPES = Path(__file__).parents[2] / "recipes" / "evaluation"
# Of images of 100 x 50: the answers below are right, half right and none.
ROWS = [("a cat.", [10, 10, 50, 30]), ("two dogs", [0, 0, 50, 50]), ("a tree", [0, 0, 9, 9])]
ANSWERS = ["<|box_start|>(100,200),(500,600)<|box_end|>", "<|box_start|>(0,0),(1000,400)<|box_end|>", "a tree"]


@pytest.fixture
def place(tmp_path, datasets_cache, monkeypatch) -> Path:
    """Where `own_boxes.parquet` lies; the recipes' folder has a task that reads another file, too."""
    number, text = datasets.Value("float32"), datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "expression": text, "box": datasets.List(number)})
    rows = [{"image": Image.new("RGB", (100, 50)), "expression": said, "box": box} for said, box in ROWS]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "own_boxes.parquet")
    shutil.copy(RECIPES / "own_boxes.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answering(tokenizer, said: list[str]):
    """A `generate` that knows the answers by the questions."""

    def generate(self, input_ids, **_):
        prompts = tokenizer.batch_decode(input_ids)
        answers = [next(answer for answer, (phrase, _) in zip(said, ROWS, strict=True) if phrase.strip(".") in prompt)
                   for prompt in prompts]  # fmt: skip
        new = tokenizer([answer + "<|im_end|>" for answer in answers], padding=True, return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, new], 1)

    return generate


def test_a_task_of_boxes_through_evaluation_and_report(place, qwen_vl_folder, monkeypatch):
    loaded, processor = load_model(str(qwen_vl_folder("qwen2_vl")), "cpu")
    for name, said in (("first", ANSWERS), ("second", ["no"] * 3)):
        monkeypatch.setattr(type(loaded), "generate", answering(processor.tokenizer, said))
        results = evaluate_loaded(
            loaded, processor, ["own_boxes"], place / name, include_path=[place], batch_size=2, name=name
        )["tasks"]["own_boxes"]
        metrics = {one: metric["value"] for one, metric in results["metrics"].items()}
        assert results["main_metric"] == "accuracy" and metrics["accuracy"] == pytest.approx(
            100 / 3 * (name == "first")
        )
    rows = pq.read_table(place / "first/samples/own_boxes.parquet").to_pylist()
    assert [row["score"] for row in rows] == [1, 0, 0] and rows[0]["question"] == REFERRING[0].format("a cat")
    text, line = rows[0]["response"].splitlines()
    assert text == "(100,200),(500,600)" and read_boxes_line(line).size == (100, 50)
    assert read_boxes_line(line).boxes[0].box == pytest.approx((10.05, 10.025, 50.05, 30.025), abs=0.01)
    assert (
        read_boxes_line(rows[2]["response"]).boxes == []
        and read_boxes_line(rows[2]["answer"]).boxes[0].label == "a tree"
    )
    store = ImageStore()
    ((_, _, _, samples),) = choose_samples(load_evaluations([place / "first", place / "second"]), 9, store)
    assert len(samples) == len(store.urls) == 3  # one black image, drawn on three times
    write_report([place / "first", place / "second"], place / "report.html")


def test_a_family_without_boxes_is_told(place, model_folder):
    loaded, processor = load_model(str(model_folder), "cpu")
    with pytest.raises(ValueError, match="a task asks for boxes"):
        evaluate_loaded(loaded, processor, ["own_boxes"], include_path=[place])
    assert isinstance(loaded, PreTrainedModel)


def test_the_truth_and_every_answer_have_a_colour():
    buffer = io.BytesIO()
    Image.new("RGB", (100, 50)).save(buffer, "PNG")
    truth = boxes_line([Box("a", (20, 20, 80, 80))])  # the model saw it twice as large
    samples = {
        "one": {"answer": truth, "response": boxes_line([Box("a", (100, 10, 190, 90))], (200, 100))},
        "two": {"answer": truth, "response": "none"},
    }
    drawn = Image.open(io.BytesIO(draw_answers(buffer.getvalue(), samples))).convert("RGB")

    def is_near(place: tuple[int, int], color: str) -> bool:
        wanted = bytes.fromhex(color[1:])
        return all(abs(a - b) < 60 for a, b in zip(drawn.getpixel(place), wanted, strict=True))

    assert drawn.size == (100, 50) and is_near((40, 36), TRUE_COLOR) and is_near((95, 30), ANSWER_COLORS[0])
    plain = {"one": {"answer": "a cat", "response": boxes_line([], (1, 1))}}
    assert draw_answers(buffer.getvalue(), plain) == buffer.getvalue()
    assert draw_answers(b"\xff\xd8\xff no image", samples) == b"\xff\xd8\xff no image"


@given(st.lists(st.tuples(st.none() | st.text(max_size=5), st.tuples(*[st.floats(0, 100)] * 4))))
def test_a_line_reads_as_it_was_written(entries):
    boxes = [Box(label, (*map(min, box[:2], box[2:]), *map(max, box[:2], box[2:]))) for label, box in entries]
    line = boxes_line(boxes, (100, 100))
    found = read_boxes_line(f"said\n{line}")
    assert (
        "\n" not in line
        and found.size == (100, 100)
        and [box.label for box in found.boxes] == [b.label for b in boxes]
    )
    assert all(box.box == pytest.approx(true.box, abs=0.006) for box, true in zip(found.boxes, boxes, strict=True))


@pytest.mark.parametrize(
    "listed",
    ['[{"box": [1, 2, NaN, 4]}]', '[{"box": [9, 1, 2, 3]}, 3]', "[" * 9000 + "]", '[{"box": [1e999, 1, 1, 1]}]'],
)
def test_lines_of_others_are_no_boxes(listed):
    found = read_boxes_line(f"boxes in 5x5 pixels: {listed}")
    assert found is None or found.boxes == []
    assert read_boxes_line(json.dumps({"a": 1})) is None
