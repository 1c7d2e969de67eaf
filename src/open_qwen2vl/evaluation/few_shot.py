r"""Evaluation of models that were only pre-trained: demonstrations, then a question, as one interleaved document.

    <s> image "\nQuestion: .. Short answer: yes<|endofchunk|>" image "\nQuestion: .. Short answer:"  ->  "no"

Each question has demonstrations of its own, drawn by the seed from the task's training split, never with its own
image; those of 4 shots are the first of 8. A task runs once for each number of shots and seed.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any, NamedTuple

from transformers import PreTrainedModel, ProcessorMixin

from ..processing.text_formats import END_OF_CHUNK_TOKEN
from .benchmarks import Benchmark
from .harness import Target
from .journal import image_digest
from .prompts import SEPARATOR

# The paper's Table 5, in percent, by number of shots.
PAPER_SCORES = {
    "gqa": {0: 27.1, 8: 35.4},
    "vqav2": {0: 40.2, 8: 51.8},
    "vizwiz": {0: 26.1, 8: 31.2},
    "okvqa": {0: 24.7, 8: 27.1},
    "textvqa": {0: 30.4, 8: 30.6},
}
PAPER_COLUMN = "Open-Qwen2VL base (paper)"
RULES = {
    "gqa": "Exact match but for case and punctuation.",
    "vqav2": "VQA's soft accuracy over ten people's answers.",
}
SOFT_ACCURACY = "VQA's soft accuracy over ten people's answers, normalised as EvalAI does."
MAX_NEW_TOKENS = 16
# A base model goes on with a sentence, or with the next question.
STOPS = ["\n", ", ", ". ", "Question", "Short answer"]

Messages = Callable[[int, dict[str, Any]], list[dict[str, Any]]]


class FewShot(NamedTuple):
    """What to prompt with."""

    shots: Sequence[int]  # numbers of demonstrations, each a run of its own
    seeds: Sequence[int] = (0, 1, 2)  # draws of the demonstrations; 0 shots run once
    split: str | None = None  # where demonstrations are from; the task's training split where not given
    # ends a demonstration; `<|endofchunk|>`, or for tokenizers without it an empty line, where not given
    separator: str | None = None

    def separator_of(self, processor: ProcessorMixin) -> str:
        """What ends a demonstration for a model."""
        if self.separator is not None:
            return self.separator
        return END_OF_CHUNK_TOKEN if END_OF_CHUNK_TOKEN in processor.tokenizer.get_vocab() else "\n\n"

    def check(self) -> None:
        """Refuse numbers that mean nothing."""
        if not self.shots or min(self.shots) < 0 or len(set(self.shots)) < len(self.shots):
            raise ValueError(f"--shots: numbers from 0, each once, got {_listed(self.shots)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds: at least one, each once, got {_listed(self.seeds)}")


class Run(NamedTuple):
    """A task with the prompts that it is run with: several for several seeds."""

    target: Target  # names the results
    task: Any  # lmms-eval's task
    messages: list[Messages | None]  # makes the messages of (document, row); None is the task's own way
    shots: int | None = None  # None where it is no few-shot run
    seeds: Sequence[int] = ()  # of the prompts


def few_shot_target(name: str) -> Target:
    """Which task a name means in a few-shot evaluation."""
    if name not in PAPER_SCORES:
        return Target(name, name, None, None, "The task's own scoring of a short completion.", None)
    rule = f"{RULES.get(name, SOFT_ACCURACY)} At most {MAX_NEW_TOKENS} tokens, cut where a sentence or clause ends."
    return Target(name, f"{name}_few_shot", "exact_match", 100.0, rule, None)


def few_shot_runs(
    loaded: Sequence[tuple[Target, Any]], few_shot: FewShot, model: PreTrainedModel, processor: ProcessorMixin
) -> list[Run]:
    """The runs of an evaluation."""
    tokenizer = processor.tokenizer
    separator = few_shot.separator_of(processor)
    ends = model.generation_config.eos_token_id
    ends = list(ends) if isinstance(ends, list | tuple) else [ends] * (ends is not None)
    if separator in tokenizer.all_special_tokens or separator in tokenizer.get_added_vocab():
        ends.append(tokenizer.convert_tokens_to_ids(separator))
    generation = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "until": STOPS, "eos_token_id": ends}
    runs = []
    for target, task in loaded:
        if task.OUTPUT_TYPE == "generate_until":
            task.config.generation_kwargs = dict(generation)
        rows = demonstration_rows(task, few_shot.split) if max(few_shot.shots) else []
        demonstrations = Demonstrations(task, rows)
        for shots in few_shot.shots:
            # Without demonstrations all seeds would give the same answers.
            seeds = list(few_shot.seeds) if shots else list(few_shot.seeds)[:1]
            prompts = [partial(demonstrations.messages, shots, seed) for seed in seeds]
            runs.append(Run(_shot_target(target, shots), task, prompts, shots, seeds))
    return runs


def _shot_target(target: Target, shots: int) -> Target:
    name, scores = f"{target.name}_{shots}shot", PAPER_SCORES.get(target.name)
    if scores is None:
        return target._replace(name=name)
    paper = {PAPER_COLUMN: scores[shots]} if shots in scores else {}
    metric = target.main_metric
    benchmark = Benchmark(name, target.task, target.task, metric, metric, target.rule, "", None, paper)
    return target._replace(name=name, benchmark=benchmark)


def demonstration_rows(task: Any, split: str | None = None) -> Any:
    """The rows that demonstrations are drawn from."""
    config = task.config
    other = (config.metadata if isinstance(config.metadata, dict) else {}).get("demonstrations", {})
    own = [config.training_split, config.fewshot_split]
    split = split or other.get("split") or next(filter(None, own), None)
    if split is None:
        raise ValueError(f"--shots: {config.task} has no training split; --demonstrations names another split")
    if not other:
        if split not in task.dataset:
            raise ValueError(f"--demonstrations: {config.task} has no split {split!r}, only {', '.join(task.dataset)}")
        rows, processed = task.dataset[split], [*own, config.validation_split, config.test_split]
        return rows if config.process_docs is None or split in processed else config.process_docs(rows)
    import datasets

    name = other["dataset_name"].format(split=split)
    rows = datasets.load_dataset(config.dataset_path, name, split=split)
    return rows if config.process_docs is None else config.process_docs(rows)


class Demonstrations:
    """Prompts of one task, with demonstrations that are drawn from some rows."""

    def __init__(self, task: Any, rows: Any):
        self._task, self._rows = task, rows

    def messages(self, shots: int, seed: int, document: int, doc: dict[str, Any]) -> list[dict[str, Any]]:
        """The demonstrations and the question as one turn; ValueError if too few rows have other images."""
        images = list(self._task.doc_to_visual(doc) or [])
        content = []
        for row, shown in self._draw(shots, f"{seed} {self._task.config.task} {document}", images):
            content += [*self._part(row, shown, f" {self._answer(row)}"), SEPARATOR]
        return [{"role": "user", "content": content + self._part(doc, images, "")}]

    def _draw(self, shots: int, key: str, own_images: list) -> list[tuple[dict, list]]:
        """Rows and their images; each draw is taken unless it shows what the question shows."""
        drawn, seen, own = [], set(), set(map(image_digest, own_images))
        generator = random.Random(key)
        while len(drawn) < shots:
            if len(seen) == len(self._rows):
                name = self._task.config.task
                raise ValueError(f"--shots {shots}: {name} has only {len(drawn)} demonstrations with other images")
            number = generator.randrange(len(self._rows))
            if number in seen:
                continue
            seen.add(number)
            row = self._rows[number]
            images = list(self._task.doc_to_visual(row) or [])
            if own.isdisjoint(map(image_digest, images)):
                drawn.append((row, images))
        return drawn

    def _part(self, row: dict[str, Any], images: list, answer: str) -> list[dict[str, Any]]:
        text = f"Question: {self._task.doc_to_text(row).strip()} Short answer:{answer}"
        return [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]

    def _answer(self, row: dict[str, Any]) -> str:
        answer = self._task.doc_to_target(row)
        if isinstance(answer, int) and self._task.config.doc_to_choice is not None:
            answer = self._task.doc_to_choice(row)[answer]
        return str(answer[0] if isinstance(answer, list) else answer).strip()


def entry_over_seeds(entries: Sequence[dict[str, Any]], shots: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Join a task's entries of `results.json`, one for each seed."""
    main = entries[0]["main_metric"]
    metrics = {}
    for name, first in entries[0]["metrics"].items():
        values = [entry["metrics"][name]["value"] for entry in entries if name in entry["metrics"]]
        errors = [entry["metrics"][name]["stderr"] for entry in entries if name in entry["metrics"]]
        error = None if None in errors else fmean(errors)
        deviation = stdev(values) if len(values) > 1 else None
        metrics[name] = {**first, "value": fmean(values), "stderr": error, "std": deviation}
    by_seed = {str(seed): entry["metrics"][main]["value"] for seed, entry in zip(seeds, entries, strict=True)}
    seconds = round(sum(entry["seconds"] for entry in entries), 2)
    return {**entries[0], "metrics": metrics, "seconds": seconds, "shots": shots, "seeds": by_seed}


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
