"""`evaluate`: scores against hand-computed ones, batch sizes, what is refused, what is kept when a task fails."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from easy_vqa import get_answers
from PIL import Image

from open_qwen2vl import cli
from open_qwen2vl.evaluation import harness
from open_qwen2vl.evaluation.benchmarks import BENCHMARKS
from open_qwen2vl.evaluation.evaluate import evaluate, evaluate_loaded, run_targets
from open_qwen2vl.evaluation.intervals import wilson
from open_qwen2vl.evaluation.report import write_report
from open_qwen2vl.evaluation.report.folders import load_evaluations
from open_qwen2vl.evaluation.report.scores import build_rows
from open_qwen2vl.evaluation.results import comparison_table, thumbnail
from open_qwen2vl.places import list_tree, place
from tests.evaluation.easyvqa import rows, write_tasks

IDENTITY = {"name": "table", "path": "table", "revision": None, "fingerprint": None}
WORDS = get_answers()


def read_samples(folder: Path, task: str) -> list[dict]:
    return pq.read_table(folder / "samples" / f"{task}.parquet").to_pylist()


@pytest.fixture(scope="module")
def table_model():
    """Knows the right answer of documents whose number does not end in 7, and says or prefers `brown` else."""
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms

    answers = [row["answer"] for row in rows(20)]

    class TableModel(lmms):
        is_simple = False

        def answer(self, document: int) -> str:
            return "brown" if document % 10 == 7 else answers[document]

        def generate_until(self, requests):
            # The task's own scoring strips what surrounds the word.
            return [GenerationResult(f" {self.answer(request.args[3])} ") for request in requests]

        def loglikelihood(self, requests):
            losses = [0.5 if request.args[1].strip() == self.answer(request.args[3]) else 4.0 for request in requests]
            return [GenerationResult((loss, loss < 1)) for loss in losses]

        def generate_until_multi_round(self, requests):
            raise NotImplementedError

        def clean(self):
            pass

    return TableModel()


def test_scores_of_a_table_are_those_computed_by_hand(table_model, easyvqa, tmp_path):
    names = ["easyvqa_gen", "easyvqa_mc"]
    manager = harness.make_task_manager(names, [easyvqa])
    targets = [harness.find_target(name) for name in names]
    results = run_targets(table_model, targets, tmp_path, manager, IDENTITY, {"limit": None})
    answers = [row["answer"] for row in rows(20)]
    right = [document % 10 != 7 or answers[document] == "brown" for document in range(20)]
    assert 0 < 20 - sum(right) <= 2
    for name, metric in zip(names, ("exact_match", "acc"), strict=True):
        entry = results["tasks"][name]
        assert entry["main_metric"] == metric and entry["num_samples"] == 20 and entry["version"] == "1.0"
        score = entry["metrics"][metric]
        p = sum(right) / 20
        assert score["value"] == pytest.approx(100 * p) and score["higher_is_better"] is True
        assert score["stderr"] == pytest.approx(100 * (p * (1 - p) / 19) ** 0.5)
        samples = read_samples(tmp_path, name)
        assert [sample["score"] for sample in samples] == [float(one) for one in right]
        assert [sample["answer"] for sample in samples] == answers
        assert [sample["prediction"] for sample in samples] == [table_model.answer(i) for i in range(20)]
        assert [sample["sample_id"] for sample in samples] == [str(i) for i in range(20)]
        assert samples[3]["prompt"] == samples[3]["question"] == rows(20)[3]["question"]
    assert read_samples(tmp_path, "easyvqa_gen")[0]["response"] == f" {answers[0]} "
    response = read_samples(tmp_path, "easyvqa_mc")[0]["response"]
    assert response == "\n".join(f"{word}: {0.5 if word == answers[0] else 4:.3f}" for word in WORDS)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    table = (tmp_path / "table.md").read_text()
    # One rule for intervals: the page computes from the samples what stands here.
    low, high = (100 * end for end in wilson(p, 20))
    assert f"| easyvqa_gen | {100 * p:.1f} [{low:.1f}, {high:.1f}] | 20 |" in table
    (row, _) = build_rows(load_evaluations([tmp_path]))
    assert row.cells[0].interval == (pytest.approx(low), pytest.approx(high), "Wilson")
    assert results["tasks"]["easyvqa_gen"]["metrics"]["exact_match"]["interval"]["low"] == pytest.approx(low)


def test_predictions_do_not_depend_on_the_batch_size(tiny_model, processor, easyvqa, tmp_path):
    """And the model, its mode and the random generators are left as they were."""
    tiny_model.train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    runs = {}
    for batch_size in (1, 3, 8):
        folder = tmp_path / str(batch_size)
        options = {"batch_size": batch_size, "include_path": [easyvqa]}
        results = evaluate_loaded(tiny_model, processor, ["easyvqa_gen", "easyvqa_mc"], folder, **options)
        assert results["options"]["batch_size"] == batch_size and results["model"]["fingerprint"] is None
        predictions = [sample["prediction"] for sample in read_samples(folder, "easyvqa_mc")]
        runs[batch_size] = ((folder / "samples" / "easyvqa_gen.parquet").read_bytes(), predictions)
        assert not (folder / "journal").exists()
    assert runs[1] == runs[3] == runs[8]
    assert len(set(runs[1][1])) > 1 or len({row["response"] for row in read_samples(folder, "easyvqa_gen")}) > 5
    assert tiny_model.training
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_limit_and_token_budget(tiny_model, processor, easyvqa):
    options = {"limit": 3, "image_seq_length": 16, "include_path": [easyvqa]}
    results = evaluate_loaded(tiny_model, processor, ["easyvqa_gen"], **options)
    assert results["tasks"]["easyvqa_gen"]["num_samples"] == 3
    assert results["options"]["image_seq_length"] == 16 and results["options"]["limit"] == 3
    with pytest.raises(ValueError, match="image_seq_length"):
        evaluate_loaded(tiny_model, processor, ["easyvqa_gen"], image_seq_length=5, include_path=[easyvqa])


def test_a_task_that_fails_leaves_the_others_results(model_folder, easyvqa, tmp_path, capsys):
    broken = yaml.safe_load((easyvqa / "easyvqa_gen.yaml").read_text())
    (tmp_path / "more").mkdir()
    text = yaml.safe_dump({**broken, "task": "broken", "doc_to_visual": "picture"})
    (tmp_path / "more" / "broken.yaml").write_text(text)
    output = tmp_path / "out"
    folders = ["--trust-task-code", "--include-path", str(easyvqa), "--include-path", str(tmp_path / "more")]
    arguments = ["--tasks", "broken,easyvqa_gen", "--limit", "2", "--device", "cpu", *folders]
    assert cli.main(["evaluate", str(model_folder), "--output", str(output), *arguments]) == 2
    error = capsys.readouterr().err
    assert "1 of 2 tasks failed: broken: AssertionError" in error and f"others are in {output}" in error
    assert list(json.loads((output / "results.json").read_text())["tasks"]) == ["easyvqa_gen"]
    assert len(read_samples(output, "easyvqa_gen")) == 2


def test_a_target_that_is_no_column_is_an_error(tiny_model, processor, tmp_path):
    """lmms-eval would take its name for the answer of every sample."""
    folder = write_tasks(tmp_path / "tasks", 2, doc_to_target="answr")
    with pytest.raises(ValueError, match="doc_to_target 'answr' is no column of the data, which has question, answer"):
        evaluate_loaded(tiny_model, processor, ["easyvqa_gen"], include_path=[folder])


def test_another_number_of_tokens_replaces_no_results(model_folder, easyvqa, tmp_path):
    options = {"limit": 1, "device": "cpu", "include_path": [easyvqa]}
    evaluate(str(model_folder), ["easyvqa_gen"], tmp_path, **options)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match="has results of image_seq_length 4, now 16: give another --output"):
        evaluate(str(model_folder), ["easyvqa_gen"], tmp_path, image_seq_length=16, **options)
    assert (tmp_path / "results.json").read_bytes() == before


def test_the_command_prints_the_table(model_folder, easyvqa, tmp_path, capsys):
    arguments = [
        "--tasks",
        "easyvqa_gen",
        "--limit",
        "2",
        "--device",
        "cpu",
        "--include-path",
        str(easyvqa),
        "--trust-task-code",
    ]
    assert cli.main(["evaluate", str(model_folder), "--output", str(tmp_path / "out"), *arguments]) == 0
    out = capsys.readouterr().out
    assert out.startswith("| task | tiny | samples | metric | rule |")
    assert "Only the first 2 samples" in out and out.endswith(f"{tmp_path}/out/results.json\n")


def test_a_judge_is_never_asked_unasked(model_folder, easyvqa, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    folder = tmp_path / "judged"
    folder.mkdir()
    config = yaml.safe_load((easyvqa / "easyvqa_gen.yaml").read_text()) | {"task": "judged"}
    lines = yaml.safe_dump(config) + "process_results: !function judging.score\n"
    (folder / "judged.yaml").write_text(lines)
    (folder / "judging.py").write_text('KEY = "OPENAI_API_KEY"\n\ndef score(doc, results):\n    raise SystemExit\n')
    arguments = ["evaluate", str(model_folder), "--tasks", "judged", "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--judge"]) == 2
    assert "--judge: the environment variable OPENAI_API_KEY is not set" in capsys.readouterr().err
    assert cli.main([*arguments, "--include-path", str(folder), "--trust-task-code"]) == 2
    assert "--tasks judged: judged may ask a paid judge; --judge allows it" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", ","], "--tasks: no task given"),
        (["--tasks", "mme", "--rules", "paper"], "--rules paper: mme is none of the paper's tasks (mmmu_val, "),
        (["--tasks", "pope", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--tasks", "pope", "--device", "banana"], "--device banana: Expected one of cpu, cuda"),
        (
            ["--tasks", "easyvqa_gen", "--include-path", "nowhere", "--trust-task-code"],
            "--include-path nowhere: no such folder",
        ),
        (
            ["--tasks", "easyvqa_gen", "--include-path", "nowhere"],
            "--include-path nowhere: the tasks there may run any code; --trust-task-code allows it",
        ),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments, message, tmp_path, capsys):
    assert cli.main(["evaluate", "no-model", "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_benchmarks_mean_the_task_of_the_rules():
    standard, paper = (harness.find_target("mathvista", rules) for rules in ("standard", "paper"))
    benchmark = BENCHMARKS["mathvista"]
    assert (standard.task, standard.main_metric, standard.rule) == (
        benchmark.task,
        benchmark.main_metric,
        benchmark.rule,
    )
    assert (paper.task, paper.main_metric, paper.rule) == (
        benchmark.paper_task,
        benchmark.paper_metric,
        benchmark.paper_rule,
    )
    judged = harness.find_target("mathvista", judge=True)
    assert judged.task == benchmark.judge_task and "judge" in judged.rule
    assert harness.find_target("mme").benchmark is None


def test_the_table_has_the_papers_scores_beside_ours():
    target = harness.find_target("mmstar")
    metric = {"value": 41.25, "stderr": None, "higher_is_better": True}
    entry = {"metrics": {"average": metric}, "main_metric": "average", "num_samples": 1500, "rule": "a | b"}
    results = {"model": {"name": "mine"}, "rules": "standard", "harness": {"lmms-eval": "0.7.3"}, "options": {}}
    lines = comparison_table({**results, "tasks": {"mmstar": entry}}, [target]).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[2:5]] == ["mine", *target.benchmark.paper_scores]
    assert lines[2].startswith("| mmstar | 41.2 | 49.7 | 46.3 | 1500 | average | a \\| b |")
    assert "scored by its own rules" in lines[-1]


def test_thumbnails_are_small_jpegs_and_leave_the_image():
    image = Image.new("RGBA", (1000, 500), "red")
    small = thumbnail(image)
    assert small.startswith(b"\xff\xd8") and image.size == (1000, 500)
    from io import BytesIO

    assert Image.open(BytesIO(small)).size == (384, 192)


@pytest.mark.slow
def test_an_unknown_task_is_told_with_those_near_it(tmp_path, capsys):
    assert cli.main(["evaluate", "no-model", "--output", str(tmp_path / "out"), "--tasks", "mmstarr"]) == 2
    assert "--tasks mmstarr: no such task; near it: mmstar" in capsys.readouterr().err


def test_few_documents_of_a_group(table_model, datasets_cache, tmp_path):
    """A group is each of its tasks."""
    folder = write_tasks(tmp_path / "tasks", 4)
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["easyvqa_gen", "easyvqa_mc"]}))
    manager = harness.make_task_manager(["both"], [folder])
    results = run_targets(table_model, [harness.find_target("both")], None, manager, IDENTITY, {"limit": 2})
    assert sorted(results["tasks"]) == ["easyvqa_gen", "easyvqa_mc"]
    assert all(entry["num_samples"] == 2 for entry in results["tasks"].values())


@pytest.mark.slow
def test_results_in_a_bucket(model_folder, easyvqa, tmp_path, memory):
    options = {"limit": 3, "device": "cpu", "include_path": [easyvqa]}
    here = evaluate(str(model_folder), ["easyvqa_gen"], tmp_path / "results", **options)
    for _ in range(2):  # again: from the journal, which stays on this machine
        there = evaluate(str(model_folder), ["easyvqa_gen"], f"{memory}/results", **options)
        assert there["tasks"].keys() == here["tasks"].keys()
        assert there["tasks"]["easyvqa_gen"]["metrics"] == here["tasks"]["easyvqa_gen"]["metrics"]
    found = [name for name, _ in list_tree(f"{memory}/results")]
    assert found == ["results.json", "samples/easyvqa_gen.parquet", "table.md"]
    samples = (place(memory) / "results" / "samples" / "easyvqa_gen.parquet").read_bytes()
    assert samples == (tmp_path / "results" / "samples" / "easyvqa_gen.parquet").read_bytes()
    page = write_report([tmp_path / "results", f"{memory}/results"], f"{memory}/report.html")
    assert b"easyvqa_gen" in page.read_bytes()
