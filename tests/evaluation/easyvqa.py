"""easy-VQA's test split as two tasks of lmms-eval: a generated answer, and a choice among the 13 words."""

from pathlib import Path

import datasets
import yaml
from easy_vqa import get_answers, get_test_image_paths, get_test_questions

GENERATION = {
    "output_type": "generate_until",
    "generation_kwargs": {"max_new_tokens": 6, "until": ["\n"]},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": get_answers(),
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def rows(number: int) -> list[dict]:
    """The first questions of every fifth picture, with the picture's file."""
    paths = get_test_image_paths()
    asked = [triple for triple in zip(*get_test_questions(), strict=True) if triple[2] % 5 == 0]
    return [
        {"question": question, "answer": answer, "image": Path(paths[image]).read_bytes()}
        for question, answer, image in asked[:number]
    ]


def write_tasks(folder: Path, number: int = 20, **changes) -> Path:
    """Parquet and YAML of `easyvqa_gen` and `easyvqa_mc` in a new folder."""
    folder.mkdir(parents=True)
    chosen = rows(number)
    columns = {name: [row[name] for row in chosen] for name in ("question", "answer")}
    columns["image"] = [{"bytes": row["image"], "path": None} for row in chosen]
    text = datasets.Value("string")
    features = datasets.Features({"question": text, "answer": text, "image": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "test.parquet")
    common = {
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "test.parquet")}},
        "test_split": "test",
        "doc_to_visual": "image",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "metadata": {"version": 1.0},
    }
    for name, own in (("easyvqa_gen", GENERATION), ("easyvqa_mc", CHOICE)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, "task": name, **own, **changes}))
    return folder
