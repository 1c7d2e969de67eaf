"""Options of the commands `evaluate` and `report`."""

from dataclasses import dataclass
from typing import Literal

from ..options import flag, option

_BASE = "base models"


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `open-qwen2vl evaluate`.

    Raises:
        ValueError: for options that do not go together.
    """

    model: str = option(
        help="hub id or folder of a model, or a training's output_dir", positional=True, metavar="MODEL"
    )
    output: str = option(help="folder of the results; a rerun finishes a killed run", metavar="DIR")
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

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        if self.shots is None and (self.demonstrations is not None or self.shot_separator is not None):
            raise ValueError("--demonstrations and --shot-separator go with --shots")
        if self.include_path and not self.trust_task_code:
            raise ValueError(
                f"--include-path {self.include_path[0]}: the tasks there may run any code; --trust-task-code allows it"
            )


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
