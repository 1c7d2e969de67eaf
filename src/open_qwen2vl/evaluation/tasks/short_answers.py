"""Questions and short answers of the five tasks that base models are evaluated on, for the YAML in `few_shot/`.

Scoring is lmms-eval's own of each benchmark; only the prompt is ours (see few_shot.py).
"""

from collections import Counter
from functools import lru_cache
from typing import Any

from PIL import Image

GQA = "lmms-lab-encoder/GQA"


def question(doc: dict[str, Any], lmms_eval_specific_kwargs: dict | None = None) -> str:
    """A row's question as it is."""
    return doc["question"]


def common_answer(doc: dict[str, Any]) -> str:
    """The answer that most people gave, the first of equals."""
    answers = [answer["answer"] if isinstance(answer, dict) else answer for answer in doc["answers"] or [""]]
    return Counter(answers).most_common(1)[0][0]


def image(doc: dict[str, Any]) -> list[Image.Image]:
    """A row's image."""
    return [doc["image"].convert("RGB")]


def soft_accuracy(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """VizWiz's, OK-VQA's and TextVQA's score, which lmms-eval has in the same form for all three."""
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    return {"exact_match": float(textvqa_process_results(doc, results)["exact_match"])}


def vqav2_accuracy(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """VQAv2's score, whose answers carry more than their text."""
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

    return {"exact_match": float(vqav2_process_results_val(doc, results)["exact_match"])}


def with_split(dataset: Any) -> Any:
    """GQA's questions with the name of their split, which says where their images are."""
    return dataset.add_column("split", [str(dataset.split)] * len(dataset))


def gqa_image(doc: dict[str, Any]) -> list[Image.Image]:
    """The image of one of GQA's questions, which lies in a configuration of its own."""
    rows, numbers = _gqa_images(doc["split"])
    return [rows[numbers[doc["imageId"]]]["image"].convert("RGB")]


@lru_cache
def _gqa_images(split: str) -> tuple[Any, dict[str, int]]:
    import datasets

    rows = datasets.load_dataset(GQA, f"{split}_balanced_images", split=split)
    return rows, {name: number for number, name in enumerate(rows["id"])}
