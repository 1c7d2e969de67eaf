"""The five tasks of base models as small repositories on a local Hub, with recorded answers and their scores.

Columns and types are those of the data sets on the Hub. Of ten people eight say one thing and two another: what the
eight say scores 1, what the two say 0.6.
"""

import io
from typing import Any

import yaml
from datasets import Dataset, Features, Image, List, Value

from tests.evaluation.fixture_rows import benchmark_fixtures, picture
from tests.evaluation.fixtures import parquet
from tests.hub_server import Hub, Repo

ROWS = 8
STRING = Value("string")
ANSWER = {"answer": STRING, "answer_confidence": STRING, "answer_id": Value("int64")}
# By task: repository, split that is asked, split of the demonstrations.
TASKS = {
    "vqav2": ("lmms-lab-encoder/VQAv2", "validation", "validation"),
    "vizwiz": ("lmms-lab-encoder/VizWiz-VQA", "val", "val"),
    "okvqa": ("lmms-lab-encoder/OK-VQA", "val2014", "val2014"),
    "textvqa": ("lmms-lab-encoder/textvqa", "validation", "train"),
    "gqa": ("lmms-lab-encoder/GQA", "testdev", "train"),
}
# Columns besides question_id, question, image and answers.
OTHERS = {
    "vqav2": {"question_type": "what", "multiple_choice_answer": "few", "image_id": 7, "answer_type": "other"},
    "vizwiz": {"category": "answerable"},
    "okvqa": {"question_type": "six", "answer_type": "other"},
}


def common_answer(task: str, split: str, number: int) -> str:
    """What most say of a question; different for each, so that a demonstration can be recognised."""
    return f"{task}{split}{number}"


def question(task: str, split: str, number: int) -> str:
    return f"What is number {number} of {task} {split}?"


def response(task: str, split: str, number: int) -> str:
    """A recorded answer: wrong, of the two, or of the eight, in a form that scoring normalises."""
    if number == 0:
        return "nothing"
    if number == 1:
        return "few"
    return common_answer(task, split, number).upper() + "." * (number % 2) + "\nQuestion: "


def score(task: str, number: int) -> float:
    """What [`response`] scores: min(1, 2/3) of the eight and min(1, 1/3) of the two, where ten were asked."""
    return {0: 0.0, 1: 0.0 if task == "gqa" else 0.6}.get(number, 1.0)


def _vqa_row(task: str, split: str, number: int) -> dict[str, Any]:
    answers = ["few"] + [common_answer(task, split, number)] * 8 + ["few"]
    if task == "vqav2":
        answers = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, 1)]
    row = {"question_id": str(number), "question": question(task, split, number), "answers": answers}
    return row | {"image": picture(number)} | OTHERS[task]


def _parquet(rows: list[dict[str, Any]], features: Features) -> bytes:
    buffer = io.BytesIO()
    Dataset.from_list(rows, features).to_parquet(buffer)
    return buffer.getvalue()


def _vqa_files(task: str) -> dict[str, bytes]:
    split = TASKS[task][1]
    answers = List(ANSWER if task == "vqav2" else STRING)
    types = {name: Value("int64") if isinstance(value, int) else STRING for name, value in OTHERS[task].items()}
    features = Features({"question_id": STRING, "question": STRING, "answers": answers, "image": Image(), **types})
    rows = [_vqa_row(task, split, number) for number in range(ROWS)]
    return {f"data/{split}-00000-of-00001.parquet": _parquet(rows, features)}


def _textvqa_files() -> dict[str, bytes]:
    """A training split beside the validation split that is there for `textvqa_val`."""
    fixture = benchmark_fixtures()["textvqa_val"]
    answers = [[common_answer("textvqa", "train", number)] * 10 for number in range(ROWS)]
    changes = [
        {"question": question("textvqa", "train", number), "answers": own, "image": picture(number + 20)}
        for number, own in enumerate(answers)
    ]
    rows = [fixture.rows[0]._replace(doc=fixture.rows[0].doc | own) for own in changes]
    return {"data/train-00000-of-00001.parquet": parquet(fixture._replace(rows=rows))}


def _gqa_files() -> dict[str, bytes]:
    """Questions and images in configurations of their own; two questions share an image."""
    files, configs = {}, []
    for split in TASKS["gqa"][1:]:
        images = [{"id": f"{split}{i}", "image": picture(i + 20 * (split == "train"))} for i in range(ROWS // 2)]
        asked = [
            {
                "id": f"{i}",
                "imageId": f"{split}{i // 2}",
                "question": question("gqa", split, i),
                "answer": common_answer("gqa", split, i),
                "fullAnswer": "It is.",
                "isBalanced": True,
            }
            for i in range(ROWS)
        ]
        text = dict.fromkeys(("id", "imageId", "question", "answer", "fullAnswer"), STRING)
        for name, rows, features in (
            (f"{split}_balanced_images", images, Features({"id": STRING, "image": Image()})),
            (f"{split}_balanced_instructions", asked, Features(text | {"isBalanced": Value("bool")})),
        ):
            path = f"{name}/{split}-00000-of-00001.parquet"
            files[path] = _parquet(rows, features)
            configs.append({"config_name": name, "data_files": [{"split": split, "path": path}]})
    return files | {"README.md": f"---\n{yaml.safe_dump({'configs': configs})}---\n".encode()}


def recorded(task: str) -> tuple[list[str], list[float]]:
    """Answers to a task's questions, and what each scores, worked out by hand."""
    split = TASKS[task][1]
    if task != "textvqa":
        return [response(task, split, i) for i in range(ROWS)], [score(task, i) for i in range(ROWS)]
    rows = benchmark_fixtures()["textvqa_val"].rows
    # Where the standard rule reads on, the completion is cut at the comma or the newline.
    cut = {"sprite, coke": 1.0, "blue\nand more": 1.0}
    return [row.response for row in rows], [cut.get(row.response, row.standard) for row in rows]


def add_few_shot_tasks(hub: Hub) -> None:
    """Put the five data sets on a local Hub, under their real names, after those of `add_benchmarks`.

    Args:
        hub (`Hub`): from `hub_server()`.
    """
    for task, (name, *_) in TASKS.items():
        special = {"gqa": _gqa_files, "textvqa": _textvqa_files}
        files = special[task]() if task in special else _vqa_files(task)
        repo = hub.repos.setdefault(("datasets", name), Repo(name, f"{hub.url}/datasets/{name}"))
        repo.files |= files
        repo.lfs |= {path for path in files if path.endswith(".parquet")}
