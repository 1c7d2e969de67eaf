"""Base models: demonstrations in the prompt, several draws, scores over seeds."""

import json
from pathlib import Path
from statistics import fmean, stdev

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from easy_vqa import get_train_image_paths, get_train_questions

from open_qwen2vl import cli
from open_qwen2vl.evaluation.evaluate import evaluate_loaded
from open_qwen2vl.evaluation.few_shot import PAPER_SCORES, Demonstrations, FewShot, demonstration_rows
from open_qwen2vl.evaluation.harness import load_tasks, make_task_manager
from open_qwen2vl.evaluation.journal import image_digest
from open_qwen2vl.evaluation.tasks.short_answers import common_answer, soft_accuracy, vqav2_accuracy
from tests.evaluation.easyvqa import rows, write_tasks


def train_rows(number: int) -> list[dict]:
    """One question for each of the first training pictures."""
    paths, questions = get_train_image_paths(), {}
    for question, answer, image in zip(*get_train_questions(), strict=True):
        questions.setdefault(image, (question, answer))
    return [
        {"question": question, "answer": answer, "image": Path(paths[image]).read_bytes()}
        for image, (question, answer) in list(questions.items())[:number]
    ]


def write_rows(path: Path, chosen: list[dict]) -> str:
    columns = {name: [row[name] for row in chosen] for name in ("question", "answer")}
    columns["image"] = [{"bytes": row["image"], "path": None} for row in chosen]
    text = datasets.Value("string")
    features = datasets.Features({"question": text, "answer": text, "image": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def shots_folder(tmp_path_factory, datasets_cache) -> Path:
    """easy-VQA with 6 questions, 12 demonstrations in `train`, and in `few` the questions and two demonstrations."""
    folder = tmp_path_factory.mktemp("few_shot") / "tasks"
    write_tasks(folder, 6)
    files = {"test": str(folder / "test.parquet"), "train": write_rows(folder / "train.parquet", train_rows(12))}
    files["few"] = write_rows(folder / "few.parquet", [*rows(6), *train_rows(2)])
    for name in ("easyvqa_gen", "easyvqa_mc"):
        path = folder / f"{name}.yaml"
        config = yaml.safe_load(path.read_text()) | {"dataset_kwargs": {"data_files": files}}
        path.write_text(yaml.safe_dump(config | {"training_split": "train"}))
    config = yaml.safe_load((folder / "easyvqa_gen.yaml").read_text()) | {"task": "no_training_split"}
    del config["training_split"]
    (folder / "no_training_split.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def task(shots_folder):
    return load_tasks(make_task_manager(["easyvqa_gen"], [shots_folder]), "easyvqa_gen")[0]


def parts(message: list[dict], kind: str) -> list:
    (turn,) = message
    return [part[kind] for part in turn["content"] if part["type"] == kind]


def test_each_question_has_demonstrations_of_its_own(task):
    demonstrations = Demonstrations(task, demonstration_rows(task))
    known = {row["question"]: row["answer"] for row in train_rows(12)}
    docs = list(task.eval_docs)
    eight = demonstrations.messages(8, 0, 3, docs[3])
    assert [part["type"] for part in eight[0]["content"]] == [*["image", "text", "separator"] * 8, "image", "text"]
    *shown, question = parts(eight, "text")
    assert question == f"Question: {docs[3]['question']} Short answer:"
    for text in shown:
        asked = text.removeprefix("Question: ").split(" Short answer: ")
        assert asked[1] == known[asked[0]]
    digests = [image_digest(image) for image in parts(eight, "image")]
    assert len(set(digests)) == 9, "drawn without replacement"

    def drawn(*arguments):
        return [image_digest(image) for image in parts(demonstrations.messages(*arguments), "image")][:-1]

    assert drawn(8, 0, 3, docs[3]) == digests[:-1]
    assert drawn(4, 0, 3, docs[3]) == digests[:4], "fewer shots are the first of more"
    assert drawn(8, 1, 3, docs[3]) != digests[:-1] and drawn(8, 0, 4, docs[3]) != digests[:-1]
    assert parts(demonstrations.messages(0, 0, 3, docs[3]), "text") == [question]


def test_a_question_never_sees_its_own_image(task):
    """In this split every image but two is that of a question, so that an unchecked draw would hit it."""
    demonstrations = Demonstrations(task, demonstration_rows(task, "few"))
    for document, doc in enumerate(task.eval_docs):
        own = image_digest(task.doc_to_visual(doc)[0])
        others = sum(image_digest(task.doc_to_visual(row)[0]) != own for row in demonstration_rows(task, "few"))
        assert others < 8
        images = parts(demonstrations.messages(others, 0, document, doc), "image")
        assert own not in [image_digest(image) for image in images[:-1]] and own == image_digest(images[-1])
        with pytest.raises(ValueError, match=f"--shots {others + 1}: easyvqa_gen has only {others} demonstrations"):
            demonstrations.messages(others + 1, 0, document, doc)


def test_results_are_means_over_seeds(tiny_model, processor, shots_folder, tmp_path):
    few_shot = FewShot((0, 2), (0, 1))
    tasks = ["easyvqa_gen", "easyvqa_mc"]
    options = {"include_path": [shots_folder], "few_shot": few_shot, "batch_size": 3}
    results = evaluate_loaded(tiny_model, processor, tasks, tmp_path, **options)
    assert results["shots"] == [0, 2]
    assert list(results["tasks"]) == [f"{task}_{shots}shot" for task in tasks for shots in (0, 2)]
    for name, entry in results["tasks"].items():
        metric = entry["metrics"][entry["main_metric"]]
        values = list(entry["seeds"].values())
        assert entry["shots"] == int(name[-5]) and list(entry["seeds"]) == (["0", "1"] if entry["shots"] else ["0"])
        assert metric["value"] == pytest.approx(fmean(values))
        assert metric["std"] == (pytest.approx(stdev(values)) if len(values) > 1 else None)
        samples = pq.read_table(tmp_path / "samples" / f"{name}.parquet").to_pylist()
        assert [row["sample_id"] for row in samples] == [str(i) for i in range(6)] * len(values)
        assert 100 * fmean(row["score"] for row in samples) == pytest.approx(metric["value"])
        for row in samples:
            assert row["prompt"].startswith("<s><|image_pad|>\nQuestion: ") and row["prompt"].endswith("Short answer:")
            assert row["prompt"].count("<|endofchunk|><|image_pad|>\nQuestion: ") == entry["shots"]
            assert len(row["images"]) == 1
    samples = pq.read_table(tmp_path / "samples" / "easyvqa_gen_2shot.parquet").to_pylist()
    assert all(one["prompt"] != other["prompt"] for one, other in zip(samples[:6], samples[6:], strict=True))
    kwargs = results["tasks"]["easyvqa_gen_2shot"]["generation_kwargs"]
    assert kwargs["max_new_tokens"] == 16
    tokenizer = processor.tokenizer
    assert kwargs["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endofchunk|>"])
    assert "(seeds ± " in (tmp_path / "table.md").read_text()


def test_an_answer_ends_where_the_demonstrations_do(tiny_model, processor, shots_folder):
    """A model that says nothing but the separator gives empty answers, and does not go on after it."""
    end = processor.tokenizer.convert_tokens_to_ids("<|endofchunk|>")
    size = tiny_model.config.text_config.vocab_size
    tiny_model.generation_config.suppress_tokens = [token for token in range(size) if token != end]
    steps = []
    tiny_model.register_forward_hook(lambda *_: steps.append(1))
    options = {"include_path": [shots_folder], "few_shot": FewShot((1,), (0,)), "limit": 2}
    evaluate_loaded(tiny_model, processor, ["easyvqa_gen"], **options)
    assert len(steps) == 1, "one batch, one token"


def test_shots_that_do_not_fit_are_an_error(tiny_model, processor, shots_folder):
    tiny_model.config.text_config.max_position_embeddings = 120
    options = {"include_path": [shots_folder], "limit": 1}
    with pytest.raises(
        ValueError, match=r"easyvqa_gen_8shot: ValueError: a prompt with its answer takes \d+ pos"
    ) as e:
        evaluate_loaded(tiny_model, processor, ["easyvqa_gen"], few_shot=FewShot((0, 8), (0,)), **options)
    assert list(e.value.results["tasks"]) == ["easyvqa_gen_0shot"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "easyvqa_gen", "--shots", "-1"], "--shots: numbers from 0, each once, got -1"),
        (["--tasks", "easyvqa_gen", "--shots", "4", "--seeds", "1,1"], "--seeds: at least one, each once, got 1, 1"),
        (["--shots", "4", "--rules", "paper"], "it does not go with --rules paper"),
        (["--demonstrations", "val"], "--demonstrations and --shot-separator go with --shots"),
        (
            ["--tasks", "no_training_split", "--shots", "4"],
            "no_training_split has no training split; --demonstrations",
        ),
        (
            ["--tasks", "easyvqa_gen", "--shots", "4", "--demonstrations", "dev"],
            "easyvqa_gen has no split 'dev', only few, test, train",
        ),
    ],
)
def test_mistakes_are_told(arguments, message, model_folder, shots_folder, tmp_path, capsys):
    folders = [
        "--trust-task-code",
        "--output",
        str(tmp_path / "out"),
        "--include-path",
        str(shots_folder),
        "--device",
        "cpu",
    ]
    assert cli.main(["evaluate", str(model_folder), *folders, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert not (tmp_path / "out" / "results.json").exists()


def test_the_command_prompts_with_a_split_and_separator_of_ones_own(model_folder, shots_folder, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--tasks", "easyvqa_gen", "--shots", "1", "--seeds", "7", "--demonstrations", "few", "--limit", "2"]
    arguments += [
        "--shot-separator",
        "\n\n",
        "--output",
        str(output),
        "--include-path",
        str(shots_folder),
        "--trust-task-code",
    ]
    assert cli.main(["evaluate", str(model_folder), *arguments, "--device", "cpu"]) == 0
    assert "| easyvqa_gen_1shot |" in capsys.readouterr().out
    entry = json.loads((output / "results.json").read_text())["tasks"]["easyvqa_gen_1shot"]
    assert list(entry["seeds"]) == ["7"]
    assert "\n\n<|image_pad|>\nQuestion: " in entry["prompt"]["example"]


def test_answers_of_ten_people():
    doc = {"question_id": 1, "answers": ["blue", "red", "red", "blue", "green", *["red"] * 5]}
    assert common_answer(doc) == "red"
    assert common_answer({"answers": [{"answer": "two"}, {"answer": "2"}, {"answer": "2"}]}) == "2"
    # Two of ten said blue: min(1, 2/3) for the eight others, 1/3 for those two.
    assert soft_accuracy(doc, ["Blue."])["exact_match"] == pytest.approx((8 * 2 / 3 + 2 / 3) / 10)
    doc = {"question_id": 1, "answers": [{"answer": word, "answer_id": i} for i, word in enumerate(doc["answers"])]}
    assert vqav2_accuracy(doc, ["blue"])["exact_match"] == pytest.approx((8 * 2 / 3 + 2 / 3) / 10)
    assert set(PAPER_SCORES) == {"gqa", "vqav2", "vizwiz", "okvqa", "textvqa"}
