"""The eight benchmarks of the paper's Table 4: which task of lmms-eval runs each, and what its score means.

Under the standard rules lmms-eval's own tasks run unchanged, but for two: SEED-Bench without its videos, and
MathVista with answers read by rules where lmms-eval asks a paid judge. Under the paper's rules our tasks run, on the
same data, with the prompts and the scoring of the original's evaluation code. The YAML of ours is in `tasks/`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TASKS_FOLDER = Path(__file__).with_name("tasks")

OURS, QWEN2_VL = "Open-Qwen2VL (paper)", "Qwen2-VL-2B-Instruct (paper)"


class Benchmark(NamedTuple):
    """One benchmark, as its tasks and its column in the paper."""

    name: str  # what a user writes
    task: str  # lmms-eval's name of the task under the standard rules
    paper_task: str  # our task under the paper's rules
    main_metric: str  # the metric of `task` that is reported
    paper_metric: str  # that of `paper_task`, a fraction
    rule: str  # how `task` scores, one sentence
    paper_rule: str  # how `paper_task` scores, one sentence
    category: str | Callable[[dict[str, Any]], str] | None  # a column, or a function of a row, that tells it
    paper_scores: dict[str, float]  # what the paper's Table 4 says, by model, in percent
    percent: float = 100.0  # what makes `main_metric` a percentage
    judge_task: str | None = None  # task of lmms-eval that asks an LLM judge over an API
    judge_metric: str | None = None  # its metric, a percentage


def _mmmu_subject(doc: dict[str, Any]) -> str:
    # validation_Accounting_1
    return doc["id"].split("_", 1)[1].rsplit("_", 1)[0]


# question_type_id, by the data set's own list.
_SEED_TYPES = dict(
    enumerate(
        [
            "Scene Understanding",
            "Instance Identity",
            "Instance Attributes",
            "Instance Location",
            "Instances Counting",
            "Spatial Relation",
            "Instance Interaction",
            "Visual Reasoning",
            "Text Understanding",
        ],
        start=1,
    )
)


def _seed_type(doc: dict[str, Any]) -> str:
    return _SEED_TYPES.get(int(doc["question_type_id"]), str(doc["question_type_id"]))


def _mathvista_task(doc: dict[str, Any]) -> str:
    return doc["metadata"]["task"]


def _scores(open_qwen2vl: float, qwen2_vl: float) -> dict[str, float]:
    return {OURS: open_qwen2vl, QWEN2_VL: qwen2_vl}


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="mmmu_val",
            task="mmmu_val",
            paper_task="mmmu_val_paper",
            main_metric="mmmu_acc",
            paper_metric="accuracy",
            rule="MMMU's official parsing: a letter, an option's text or, where neither is found, a random letter.",
            paper_rule="MMMU's official parsing of 16 tokens of completion, cut at a comma, period or newline.",
            category=_mmmu_subject,
            paper_scores=_scores(39.8, 41.1),
        ),
        Benchmark(
            name="mmbench_en_dev_static",
            task="mmbench_en_dev_static",
            paper_task="mmbench_en_dev_paper",
            main_metric="gpt_eval_score",
            paper_metric="accuracy",
            rule="CircularEval without a judge: a question is right if every rotation of its options is.",
            paper_rule="Each rotation counts for itself; right if the lower-case answer contains the letter.",
            category="category",
            paper_scores=_scores(80.9, 68.8),
            percent=1.0,
        ),
        Benchmark(
            name="seedbench",
            task="seedbench_image",
            paper_task="seedbench_paper",
            main_metric="seed_image",
            paper_metric="accuracy",
            rule="Image questions only; the answer's first character must be the letter.",
            paper_rule="Image questions only; right if the lower-case answer contains the letter.",
            category=_seed_type,
            paper_scores=_scores(72.5, 72.0),
        ),
        Benchmark(
            name="mmstar",
            task="mmstar",
            paper_task="mmstar_paper",
            main_metric="average",
            paper_metric="accuracy",
            rule="The letter is read from the answer's usual forms; mean over the 18 finer categories.",
            paper_rule="Right if the answer contains the upper-case letter; mean over questions.",
            category="category",
            paper_scores=_scores(49.7, 46.3),
        ),
        Benchmark(
            name="ai2d",
            task="ai2d",
            paper_task="ai2d_paper",
            main_metric="exact_match",
            paper_metric="accuracy",
            rule="The answer must be the letter, alone or before a period.",
            paper_rule="The most probable of A, B, C, D as the first token, whatever the model would have written.",
            category=None,
            paper_scores=_scores(66.3, 72.3),
        ),
        Benchmark(
            name="textvqa_val",
            task="textvqa_val",
            paper_task="textvqa_val_paper",
            main_metric="exact_match",
            paper_metric="accuracy",
            rule="VQA's soft accuracy over ten people's answers, normalised as EvalAI does; no OCR in the prompt.",
            paper_rule="The same soft accuracy (M4C) of at most 16 tokens of completion without commas and periods.",
            category=None,
            paper_scores=_scores(63.3, 78.8),
        ),
        Benchmark(
            name="mathvista",
            task="mathvista_rules",
            paper_task="mathvista_paper",
            main_metric="accuracy",
            paper_metric="accuracy",
            rule="testmini; letter, number or list read from the answer by rules, no judge; nothing found is wrong.",
            paper_rule="testmini; every question, with options or without, scored as MMMU's open questions are.",
            category=_mathvista_task,
            paper_scores=_scores(53.1, 48.0),
            judge_task="mathvista_testmini_format",
            judge_metric="llm_as_judge_eval",
        ),
        Benchmark(
            name="pope",
            task="pope",
            paper_task="pope_paper",
            main_metric="pope_f1_score",
            paper_metric="mean_f1",
            rule="F1 of `yes` over all questions together; the answer must be the one word.",
            paper_rule="Mean of the F1 of `yes` over adversarial, popular and random.",
            category="category",
            paper_scores=_scores(84.4, 87.6),
        ),
    )
}


def category_of(benchmark: Benchmark, doc: dict[str, Any]) -> str | None:
    """The category of a row."""
    if benchmark.category is None:
        return None
    return str(benchmark.category(doc) if callable(benchmark.category) else doc[benchmark.category])


def sample_scores(task: str, values: list[Any]) -> list[float | None]:
    """What each sample adds to a score, from the values that a task's `process_results` gave its main metric.

    Their mean is the score, but for MMStar (a mean over categories) and POPE (an F1 of these answers). MMBench's
    CircularEval scores a question: the row with the unrotated options holds it, the other rotations hold None.
    """
    return _SAMPLE_SCORES.get(task, _plain_scores)(values)


def _plain_scores(values: list[Any]) -> list[float | None]:
    numbers = [value.get("score") if isinstance(value, dict) else value for value in values]
    return [None if number is None else float(number) for number in numbers]


def _mmmu_scores(values: list[dict]) -> list[float | None]:
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    return [float(evaluate_mmmu([value])[1]["acc"]) for value in values]


def _seed_scores(values: list[dict]) -> list[float | None]:
    return [float(value["pred"].lower().strip() == value["answer"].lower().strip()) for value in values]


def _mmbench_scores(values: list[dict]) -> list[float | None]:
    import pandas
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    table = pandas.DataFrame(values)
    answers = dict(zip(table["index"], table["answer"], strict=True))
    questions = {int(number): rows for number, rows in table.groupby(table["index"] % 1_000_000)}
    # A rotation of question q has the index k * 1,000,000 + q.
    return [
        float(mmbench_evaluator.eval_sub_data(questions[index], answers, static_only=True)) if index < 1e6 else None
        for index in table["index"]
    ]


_SAMPLE_SCORES: dict[str, Callable[[list], list[float | None]]] = {
    "mmmu_val": _mmmu_scores,
    "mmbench_en_dev_static": _mmbench_scores,
    "seedbench_image": _seed_scores,
}
