"""What an evaluation leaves: `results.json`, `samples/TASK.parquet` and `table.md`.

Scores are percentages where a task's metric is a fraction; a sample's score is from 0 to 1. Files appear as a whole
and hold no time but `seconds`, so that the same answers give the same bytes.
"""

import io
import json
import math
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..files import renamed_when_whole, write_text
from ..places import Place
from ..transfers import make_folder
from .benchmarks import category_of, sample_scores
from .harness import Target
from .intervals import confidence_interval
from .prompts import ShownPrompt, message_images

FORMAT_VERSION = 1
FILES = ("results.json", "table.md")
THUMBNAIL_SIDE = 384
ROWS_PER_GROUP = 256
# Where a task keeps the answer that it read out of a response.
PARSED = ("parsed_pred", "pred", "prediction")
SAMPLES_SCHEMA = pa.schema(
    {
        "sample_id": pa.string(),
        "category": pa.string(),
        "question": pa.string(),
        "prompt": pa.string(),
        "answer": pa.string(),
        "prediction": pa.string(),
        "response": pa.string(),
        "score": pa.float64(),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
    }
)


class TaskResult:
    """Scores and samples of one task that ran."""

    def __init__(self, target: Target, task: Any, raw: dict[str, Any], prompts: dict[tuple[str, int], ShownPrompt]):
        self.target, self.task, self.raw = target, task, raw
        name = task.config.task
        # One entry for each filter and document; the first filter's come first.
        logged = raw["samples"][name]
        documents = len({sample["doc_id"] for sample in logged})
        self.samples = sorted(logged[:documents], key=lambda sample: sample["doc_id"])
        shown = [prompts.get((name, sample["doc_id"])) for sample in self.samples]
        self.prompts = [
            own or ShownPrompt(*[_context(sample)] * 2) for own, sample in zip(shown, self.samples, strict=True)
        ]
        self._values, self.higher_is_better = _metric_values(raw["results"][name]), raw["higher_is_better"][name]
        metrics = [metric["metric"] for metric in task.config.metric_list or []]
        self.main_metric = target.main_metric or next((name for name in metrics if name in self._values), "")
        self.main_metric = self.main_metric or next(iter(self._values), "")
        if self.main_metric not in self._values:
            raise ValueError(f"{target.name}: task {name} gave no value for its metric {self.main_metric!r}")
        self.scores = self._sample_scores()
        self.categories = self._sample_categories()

    def _sample_scores(self) -> list[float | None]:
        values = [sample.get(self.main_metric) for sample in self.samples]
        if self.target.benchmark is not None:
            return sample_scores(self.task.config.task, values)
        try:
            scores = sample_scores(self.task.config.task, values)
        except (TypeError, ValueError):
            return [None] * len(values)
        within = all(score is None or 0 <= score <= 1 for score in scores)
        return scores if within else [None] * len(scores)

    def _sample_categories(self) -> list[str | None]:
        if self.target.benchmark is None:
            return [None] * len(self.samples)
        return [category_of(self.target.benchmark, sample["doc"]) for sample in self.samples]

    def entry(self, seconds: float) -> dict[str, Any]:
        """The task's part of `results.json`."""
        config = self.task.config
        return {
            "task": config.task,
            "version": str(self.raw["versions"][config.task]),
            "rule": self.target.rule,
            "main_metric": self.main_metric,
            "metrics": self._metrics(),
            "num_samples": len(self.samples),
            "generation_kwargs": json.loads(json.dumps(config.generation_kwargs, default=str)),
            "prompt": {"example": self.prompts[0].text},
            "seconds": round(seconds, 2),
            "categories": self._category_scores(),
        }

    def _metrics(self) -> dict[str, dict[str, Any]]:
        scores = [score for score in self.scores if score is not None]
        value = self._values[self.main_metric]
        mean = fmean(scores) if scores else None
        is_mean = mean is not None and math.isclose(value, mean, abs_tol=1e-9)
        percent = self.target.percent or (100.0 if is_mean else 1.0)
        is_mean = mean is not None and math.isclose(value * percent, mean * 100, abs_tol=1e-6)
        metrics = {}
        for name, number in self._values.items():
            own = name == self.main_metric
            error = 100 * stdev(scores) / math.sqrt(len(scores)) if own and is_mean and len(scores) > 1 else None
            # The other metrics of a task that is not one of the eight may be anything.
            factor = percent if own or self.target.percent else 1.0
            metrics[name] = {
                "value": number * factor,
                "stderr": error,
                "higher_is_better": self.higher_is_better.get(name.split(",")[0]),
            }
        return metrics

    def _category_scores(self) -> dict[str, dict[str, Any]]:
        groups: dict[str, list[float]] = {}
        for category, score in zip(self.categories, self.scores, strict=True):
            if category is not None and score is not None:
                groups.setdefault(category, []).append(score)
        return {
            category: {"score": 100 * fmean(scores), "num_samples": len(scores)}
            for category, scores in sorted(groups.items())
        }

    def row_groups(self) -> Iterator[list[dict[str, Any]]]:
        """Rows of `samples/TASK.parquet`, some at a time, their images made small."""
        for start in range(0, len(self.samples), ROWS_PER_GROUP):
            yield [self._row(i) for i in range(start, min(start + ROWS_PER_GROUP, len(self.samples)))]

    def _row(self, number: int) -> dict[str, Any]:
        sample = self.samples[number]
        prediction, response = self._answers(sample)
        return {
            "sample_id": str(sample["doc_id"]),
            "category": self.categories[number],
            "question": self.prompts[number].question,
            "prompt": self.prompts[number].text,
            "answer": self._reference(sample),
            "prediction": prediction,
            "response": response,
            "score": self.scores[number],
            "images": [{"bytes": thumbnail(image), "path": None} for image in self._images(sample["doc_id"])],
        }

    def _answers(self, sample: dict[str, Any]) -> tuple[str, str]:
        """Prediction and response as text."""
        responses = [_first(response) for response in sample["resps"]]
        if isinstance(responses[0], list | tuple):
            choices = [str(choice) for choice in self.task.doc_to_choice(sample["doc"])]
            losses = [loss for loss, _ in responses]
            lines = [f"{choice}: {loss:.3f}" for choice, loss in zip(choices, losses, strict=False)]
            return choices[losses.index(min(losses))], "\n".join(lines)
        value = sample.get(self.main_metric)
        parsed = next((value[key] for key in PARSED if key in value), None) if isinstance(value, dict) else None
        filtered = _first(sample["filtered_resps"])
        return _text(filtered if parsed is None else parsed).strip(), _text(responses[0])

    def _reference(self, sample: dict[str, Any]) -> str:
        target = sample["target"]
        if isinstance(target, int) and self.task.config.doc_to_choice is not None:
            return str(self.task.doc_to_choice(sample["doc"])[target])
        return _text(target)

    def _images(self, document: int) -> list[Image.Image]:
        doc = self.task.eval_docs[document]
        if hasattr(self.task, "doc_to_messages"):
            return message_images(self.task.doc_to_messages(doc))
        # Of a video, a path there, no picture is kept.
        return [visual for visual in self.task.doc_to_visual(doc) or [] if isinstance(visual, Image.Image)]


def write_samples(results: Sequence[TaskResult], path: Place) -> None:
    """Write a row for each sample of one task, which has several results where it ran with several prompts."""
    make_folder(path.parent)
    with renamed_when_whole(path) as temporary, pq.ParquetWriter(temporary, SAMPLES_SCHEMA) as writer:
        for result in results:
            for rows in result.row_groups():
                writer.write_table(pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA))


def add_interval(entry: dict[str, Any], results: Sequence[TaskResult]) -> None:
    """Put the main metric's 95 % interval into an entry of `results.json`; answers of several seeds are averaged."""
    main = entry["metrics"][entry["main_metric"]]
    scores = np.array([[np.nan if score is None else score for score in own.scores] for own in results])
    interval = confidence_interval(main["value"], scores.mean(axis=0), main["stderr"])
    main["interval"] = None if interval is None else interval._asdict()


def _metric_values(results: dict[str, Any]) -> dict[str, float]:
    """Finite values by metric; those of filters after the first have the filter's name in theirs."""
    values, first = {}, None
    for key, value in results.items():
        metric, comma, used = key.rpartition(",")
        if not comma or metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
            continue
        first = first or used
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            values[metric if used == first else key] = float(value)
    return values


def _context(sample: dict[str, Any]) -> str:
    return next((argument for argument in sample["arguments"] if isinstance(argument, str)), "")


def _first(value: Any) -> Any:
    """The answer inside lists of one; pairs of loss and greedy stay."""
    while isinstance(value, list) and value and not isinstance(value[0], float):
        value = value[0]
    return value


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " | ".join(dict.fromkeys(_text(part) for part in value))
    return "" if value is None else str(value)


def thumbnail(image: Image.Image) -> bytes:
    """A JPEG of an image, its longer side at most 384 pixels; the image is left as it is."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def versions() -> dict[str, dict[str, str]]:
    """Versions of what ran: `harness` and `versions` of `results.json`."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    packages |= {"open_qwen2vl": version("open-qwen2vl"), "python": platform.python_version()}
    return {"harness": {"lmms-eval": version("lmms-eval")}, "versions": packages}


def write_results(results: dict[str, Any], targets: Sequence[Target], output: Place) -> None:
    """Write `results.json` and `table.md`."""
    make_folder(output)
    texts = {
        FILES[0]: json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        FILES[1]: comparison_table(results, targets),
    }
    for name, text in texts.items():
        write_text(output / name, text)


def comparison_table(results: dict[str, Any], targets: Sequence[Target]) -> str:
    """Scores with 95 % intervals beside those of the paper, with the rule of each, as Markdown."""
    papers = {target.name: target.benchmark.paper_scores for target in targets if target.benchmark is not None}
    columns = list(dict.fromkeys(column for scores in papers.values() for column in scores))
    header = ["task", results["model"]["name"], *columns, "samples", "metric", "rule"]
    rows = []
    for name, entry in results["tasks"].items():
        main = entry["metrics"][entry["main_metric"]]
        own, interval = f"{main['value']:.1f}", main.get("interval")
        own += f" [{interval['low']:.1f}, {interval['high']:.1f}]" if interval is not None else ""
        own += f" (seeds ± {main['std']:.1f})" if main.get("std") is not None else ""
        paper = [f"{papers.get(name, {}).get(column, math.nan):.1f}".replace("nan", "") for column in columns]
        rows.append([name, own, *paper, str(entry["num_samples"]), entry["main_metric"], entry["rule"]])
    lines = [header, ["---", *["---:"] * (len(columns) + 2), "---", "---"], *rows]
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    notes = [f"Rules: {results['rules']}; lmms-eval {results['harness']['lmms-eval']}; [95 % interval]."]
    if results["options"].get("limit"):
        notes.append(f"Only the first {results['options']['limit']} samples of each task: not comparable.")
    if columns and results.get("shots"):
        notes.append("The paper's column is its Table 5; ± of seeds is their standard deviation.")
    elif columns:
        notes.append("The paper's columns are its Table 4, scored by its own rules (`--rules paper`) on full splits.")
    return table + "\n\n" + " ".join(notes) + "\n"
