"""The eight benchmarks in a process whose environment names a Hub: `benchmarks_client.py ANSWERS MODEL OUT`.

Under each kind of rules a model that answers from a table, whose scores are known, and two real ones.
"""

import json
import sys
from pathlib import Path

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms

from open_qwen2vl.evaluation.benchmarks import BENCHMARKS
from open_qwen2vl.evaluation.evaluate import evaluate
from open_qwen2vl.evaluation.few_shot import FewShot, few_shot_target
from open_qwen2vl.evaluation.generation import cut_at, load_model
from open_qwen2vl.evaluation.harness import find_target, make_task_manager
from open_qwen2vl.evaluation.runs import run_targets

RULES = ("standard", "paper")


class TableModel(lmms):
    """Answers each document with a recorded answer, cut as the task asks for, and keeps what it was asked."""

    is_simple = False

    def __init__(self, answers: dict[str, list[str]]):
        super().__init__()
        self.answers = answers
        self.asked: dict[str, list] = {}

    def clean(self) -> None:
        pass

    def _ask(self, task: str, content: list) -> None:
        shown = [part if isinstance(part, str) else list(part.size) for part in content]
        self.asked.setdefault(task, []).append(shown)

    def generate_until(self, requests: list) -> list[str]:
        results = []
        for request in requests:
            _, doc_to_messages, options, document, task, split = request.args
            content = doc_to_messages(self.task_dict[task][split][document])[0]["content"]
            self._ask(task, [part["text"] if part["type"] == "text" else part["url"] for part in content])
            results.append(cut_at(self.answers[task][document], options.get("until", [])))
        return results

    def loglikelihood(self, requests: list) -> list[GenerationResult]:
        results = []
        for request in requests:
            context, letter, doc_to_visual, document, task, split = request.args
            if letter == "A":
                self._ask(task, [*doc_to_visual(self.task_dict[task][split][document]), context])
            named = [one for one in self.answers[task][document].upper() if one in "ABCD"] or ["A"]
            results.append(GenerationResult(text=(float(letter != named[0]), letter == named[0])))
        return results

    def generate_until_multi_round(self, requests: list) -> list[str]:
        raise NotImplementedError


def run_table(rules: str, answers: dict[str, list[str]], out: Path) -> dict:
    """All benchmarks with the recorded answers."""
    targets = [find_target(name, rules) for name in BENCHMARKS]
    table = TableModel({target.task: answers[target.name] for target in targets})
    manager = make_task_manager([target.task for target in targets])
    options = {"limit": None, "judge": False}
    results = run_targets(table, targets, out / f"table_{rules}", manager, {"name": "table"}, options, rules=rules)
    return {"results": results, "asked": {target.name: table.asked[target.task] for target in targets}}


def run_few_shot_table(answers: dict[str, list[str]], model: str, out: Path) -> dict:
    """The tasks of base models with the recorded answers."""
    table = TableModel({f"{name}_few_shot": own for name, own in answers.items()})
    table.model, table.processor = load_model(model, "cpu")
    targets = [few_shot_target(name) for name in answers]
    manager = make_task_manager([target.task for target in targets])
    options = {"limit": None, "judge": False}
    few_shot = FewShot((0,))
    return run_targets(table, targets, out / "table_few", manager, {"name": "table"}, options, few_shot=few_shot)


if __name__ == "__main__":
    answers, model, out = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], Path(sys.argv[3])
    few_answers = json.loads((out / "few_shot_answers.json").read_text())
    figures = {}
    for rules in RULES:
        figures[f"table {rules}"] = run_table(rules, answers, out)
        figures[f"real {rules}"] = evaluate(
            model, None, out / f"real_{rules}", rules=rules, limit=3, batch_size=2, device="cpu"
        )
    few = figures["few"] = {"table": run_few_shot_table(few_answers, model, out)}
    options = {"few_shot": FewShot((0, 2), (0, 1)), "limit": 3, "batch_size": 2, "device": "cpu"}
    few["real"] = evaluate(model, None, out / "real_few", **options)
    stock = figures["stock"] = {}
    for rules in RULES:
        options = {"rules": rules, "limit": 2, "batch_size": 2, "device": "cpu"}
        stock[rules] = evaluate(str(out / "qwen2_vl"), ["mmmu_val", "ai2d", "pope"], out / f"stock_{rules}", **options)
    (out / "figures.json").write_text(json.dumps(figures))
