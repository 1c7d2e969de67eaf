"""The eight benchmarks: each loads from a Hub, asks, and scores recorded answers as counted by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import GenerationConfig

from open_qwen2vl import OpenQwen2VLForConditionalGeneration
from open_qwen2vl.evaluation.benchmarks import BENCHMARKS, TASKS_FOLDER, category_of, sample_scores
from tests.evaluation.few_shot_fixtures import TASKS, add_few_shot_tasks, common_answer, question, recorded
from tests.evaluation.fixture_rows import benchmark_fixtures
from tests.evaluation.fixtures import add_benchmarks, write_answers
from tests.hub_server import hub_server
from tests.qwen_vl import save_qwen_vl

CLIENT = Path(__file__).with_name("benchmarks_client.py")
FIXTURES = benchmark_fixtures()
both_rules = pytest.mark.parametrize("rules", ["standard", "paper"])
each_benchmark = pytest.mark.parametrize("name", list(BENCHMARKS))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, backbones, processor) -> dict:
    """Results of all runs, and `out`, the folder with their files."""
    out = tmp_path_factory.mktemp("benchmarks")
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, image_seq_length=4)
    # Every token ends an answer: a random model would else use up each task's longest one.
    model.generation_config.eos_token_id = list(range(model.config.text_config.vocab_size))
    model.save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    folder = save_qwen_vl(out / "qwen2_vl", "qwen2_vl")
    GenerationConfig(eos_token_id=list(range(544)), pad_token_id=0).save_pretrained(folder)
    write_answers(out / "answers.json")
    (out / "few_shot_answers.json").write_text(json.dumps({task: recorded(task)[0] for task in TASKS}))
    with hub_server() as hub:
        add_benchmarks(hub)
        add_few_shot_tasks(hub)
        environment = {**os.environ, **hub.environment(out / "home"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, CLIENT, out / "answers.json", out / "model", out]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not hub.refused
    return json.loads((out / "figures.json").read_text()) | {"out": out}


def _rows(outcome: dict, kind: str, rules: str, name: str) -> list[dict]:
    return pq.read_table(outcome["out"] / f"{kind}_{rules}" / "samples" / f"{name}.parquet").to_pylist()


@each_benchmark
@both_rules
def test_recorded_answers_score_what_was_counted_by_hand(outcome, name, rules):
    fixture = FIXTURES[name]
    entry = outcome[f"table {rules}"]["results"]["tasks"][name]
    expected = getattr(fixture, rules)
    percent = expected if (name, rules) == ("mmbench_en_dev_static", "standard") else 100 * expected
    assert entry["metrics"][entry["main_metric"]]["value"] == pytest.approx(percent)
    asked = [row for row in fixture.rows if name != "seedbench" or row.doc["data_type"] == "image"]
    assert len(asked) >= 8 and entry["num_samples"] == len(asked)
    rows = _rows(outcome, "table", rules, name)
    # Right answers move the score and wrong ones do not: each sample by itself.
    assert [row["score"] for row in rows] == [getattr(row, rules) for row in asked]
    assert {0.0, 1.0} <= {row["score"] for row in rows}
    assert [row["category"] for row in rows] == [category_of(BENCHMARKS[name], row.doc) for row in asked]


@each_benchmark
@both_rules
def test_a_real_model_answers_each_benchmark(outcome, name, rules):
    results = outcome[f"real {rules}"]
    entry = results["tasks"][name]
    assert entry["num_samples"] == 3 and math.isfinite(entry["metrics"][entry["main_metric"]]["value"])
    prompts = [row["prompt"] for row in _rows(outcome, "real", rules, name)]
    assert all("<|image_pad|>" in prompt for prompt in prompts)
    if rules == "paper":
        assert all(prompt.endswith("\nAnswer:") and "<|im_start|>" not in prompt for prompt in prompts)
    else:
        assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in prompts)


@both_rules
def test_qwen2_vl_is_asked_by_either_rules(outcome, rules):
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    for name in ("mmmu_val", "ai2d", "pope"):
        entry = outcome["stock"][rules]["tasks"][name]
        assert entry["num_samples"] == 2 and math.isfinite(entry["metrics"][entry["main_metric"]]["value"])
        rows = pq.read_table(outcome["out"] / f"stock_{rules}" / "samples" / f"{name}.parquet").to_pylist()
        for prompt in (row["prompt"] for row in rows):
            assert image in prompt and "<s>" not in prompt
            assert ("<|im_start|>" in prompt) == (rules == "standard")
            assert prompt.endswith("Answer:" if rules == "paper" else "<|im_start|>assistant\n")


@each_benchmark
@both_rules
def test_every_question_shows_its_images(outcome, name, rules):
    for asked, row in zip(outcome[f"table {rules}"]["asked"][name], FIXTURES[name].rows, strict=False):
        sizes = [tuple(part) for part in asked if not isinstance(part, str)]
        columns = ["image", "decoded_image", *(f"image_{number}" for number in range(1, 8))]
        images = [row.doc.get(column) for column in columns]
        images = [one for image in images for one in (image if isinstance(image, list) else [image])]
        assert sizes == [image.size for image in images if hasattr(image, "size")]
        assert sum(isinstance(part, str) for part in asked) >= 1


def test_seedbench_never_touches_its_videos(outcome):
    for rules in ("standard", "paper"):
        assert len(outcome[f"table {rules}"]["asked"]["seedbench"]) == 8


def test_paper_rules_generate_as_the_original_does(outcome):
    for name, entry in outcome["table paper"]["results"]["tasks"].items():
        if name != "ai2d":
            options = entry["generation_kwargs"]
            assert options["max_new_tokens"] == 16 and options["until"] == [",", ".", "\n"]
            assert not options["do_sample"]


def test_the_table_has_the_papers_scores():
    papers = [benchmark.paper_scores["Open-Qwen2VL (paper)"] for benchmark in BENCHMARKS.values()]
    assert papers == [39.8, 80.9, 72.5, 49.7, 66.3, 63.3, 53.1, 84.4]


def test_every_task_of_ours_has_a_file():
    ours = {path.stem for path in TASKS_FOLDER.rglob("*.yaml")}
    named = {benchmark.paper_task for benchmark in BENCHMARKS.values()} | {"seedbench_image", "mathvista_rules"}
    few_shot = {f"{task}_few_shot" for task in TASKS}
    assert named | few_shot | {"common"} == ours


def test_sample_scores_of_other_tasks_are_numbers_or_none():
    assert sample_scores("any", [1, 0.5, True, {"score": 1}, {"other": 1}, None]) == [1.0, 0.5, 1.0, 1.0, None, None]


def test_categories_have_names():
    assert category_of(BENCHMARKS["mmmu_val"], {"id": "validation_Art_Theory_12"}) == "Art_Theory"
    assert category_of(BENCHMARKS["seedbench"], {"question_type_id": 9}) == "Text Understanding"
    assert category_of(BENCHMARKS["ai2d"], {}) is None


@pytest.mark.parametrize("task", list(TASKS))
def test_tasks_of_base_models(outcome, task):
    """Recorded answers score what was counted by hand; demonstrations are rows of their split with their answers."""
    entry = outcome["few"]["table"]["tasks"][f"{task}_0shot"]
    expected = recorded(task)[1]
    assert [row["score"] for row in _rows(outcome, "table", "few", f"{task}_0shot")] == pytest.approx(expected)
    assert entry["metrics"]["exact_match"]["value"] == pytest.approx(100 * sum(expected) / len(expected))
    assert "seeds" in outcome["few"]["real"]["tasks"][f"{task}_2shot"]
    rows = _rows(outcome, "real", "few", f"{task}_2shot")
    assert [row["sample_id"] for row in rows] == ["0", "1", "2"] * 2
    _, asked, shown = TASKS[task]
    known = {question(task, shown, i): common_answer(task, shown, i) for i in range(8)}
    drawn = set()
    for row in rows:
        one, two, last = row["prompt"].removeprefix("<s><|image_pad|>\n").split("<|endofchunk|><|image_pad|>\n")
        for shot in (one, two):
            text, answer = shot.removeprefix("Question: ").split(" Short answer: ")
            assert known[text] == answer
            drawn.add(text)
            assert shown != asked or int(text.split()[3]) != int(row["sample_id"])
        if task != "textvqa":
            assert last == f"Question: {question(task, asked, int(row['sample_id']))} Short answer:"
    assert len(drawn) > 3
