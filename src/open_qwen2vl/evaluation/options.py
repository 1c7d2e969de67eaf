"""Options of the commands `evaluate` and `report`."""

from dataclasses import dataclass
from typing import Literal

from ..options import flag, option

_BASE = "base models"
_ENDPOINT = "a server in place of MODEL"


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `open-qwen2vl evaluate`.

    Raises:
        ValueError: for options that do not go together.
    """

    output: str = option(help="folder of the results; a rerun finishes a killed run", metavar="DIR")
    model: str | None = option(
        None, help="hub id or folder of a model, or a training's output_dir", positional=True, metavar="MODEL"
    )
    tasks: tuple[str, ...] | None = option(
        None,
        help="benchmarks, or any tasks of lmms-eval (default: the paper's eight)",
        metavar="NAME,...",
        form="commas",
    )
    rules: Literal["standard", "paper"] = option("standard", help="lmms-eval's prompts and scoring, or the paper's")
    batch_size: int = option(8, help="prompts that run at a time, in each process", metavar="N")
    max_new_tokens: int = option(1024, help="longest answer where a task names none", metavar="N")
    limit: int | None = option(None, help="only the first samples of each task", metavar="N")
    image_seq_length: int | None = option(None, help="tokens per image (default: the processor's)", metavar="N")
    device: str | None = option(None, help="as cuda:1 or cpu (default: a GPU where there is one)", metavar="NAME")
    judge: bool = option(False, help="allow tasks that ask an LLM judge over a paid API (OPENAI_API_KEY)")
    include_path: tuple[str, ...] = option(
        (),
        help="folder with YAML files of more tasks, whose Python code runs (--trust-task-code); may be repeated",
        metavar="DIR",
        form="repeated",
    )
    trust_task_code: bool = option(False, help="run the Python code and templates of --include-path's folders")
    shots: tuple[int, ...] | None = option(
        None,
        help="evaluate a base model with so many demonstrations, on the five tasks of the paper's Table 5 by default",
        metavar="N,...",
        form="commas",
        group=_BASE,
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2), help="with --shots: draws of the demonstrations", metavar="N,...", form="commas", group=_BASE
    )
    demonstrations: str | None = option(
        None,
        help="with --shots: the split to draw them from (default: the task's training split)",
        metavar="SPLIT",
        group=_BASE,
    )
    shot_separator: str | None = option(
        None,
        help="with --shots: ends a demonstration (default: <|endofchunk|> where the tokenizer has it)",
        metavar="TEXT",
        group=_BASE,
    )

    endpoint: str | None = option(
        None,
        help="ask a server of OpenAI's chat completions, as http://127.0.0.1:8000/v1: --batch-size requests at a "
        "time, with the key of OPENAI_API_KEY",
        metavar="URL",
        group=_ENDPOINT,
    )
    endpoint_model: str | None = option(
        None,
        help="the model's name there (default: the only one that the server lists)",
        metavar="NAME",
        group=_ENDPOINT,
    )

    def __post_init__(self):
        self._check_endpoint()
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        if self.shots is None and (self.demonstrations is not None or self.shot_separator is not None):
            raise ValueError("--demonstrations and --shot-separator go with --shots")
        if self.include_path and not self.trust_task_code:
            raise ValueError(
                f"--include-path {self.include_path[0]}: the tasks there may run any code; --trust-task-code allows it"
            )

    def _check_endpoint(self) -> None:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("give a MODEL or --endpoint URL, one of the two")
        if self.endpoint is None:
            if self.endpoint_model is not None:
                raise ValueError("--endpoint-model goes with --endpoint")
            return
        paper = self.rules == "paper"
        local = {"image_seq_length": self.image_seq_length, "device": self.device, "shots": self.shots}
        if paper or any(value is not None for value in local.values()):
            named = "--rules paper" if paper else flag(next(name for name in local if local[name] is not None))
            raise ValueError(f"{named} does not go with --endpoint: the server loads the model and makes the prompts")


@dataclass(frozen=True)
class ReportOptions:
    """The options of `open-qwen2vl report`."""

    results: tuple[str, ...] = option(
        help="folders written by open-qwen2vl evaluate", positional=True, metavar="RESULTS"
    )
    output: str = option("report.html", help="the page to write", metavar="FILE")
    samples_per_task: int = option(
        200, help="most samples shown of a task, those on which models disagree first", metavar="N"
    )
