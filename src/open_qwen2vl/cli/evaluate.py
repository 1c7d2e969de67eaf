"""`open-qwen2vl evaluate`: benchmarks by lmms-eval."""

import argparse


def add_command(commands: "argparse._SubParsersAction") -> None:
    """Add `evaluate` to the subcommands."""
    summary = "score a model on benchmarks with lmms-eval"
    parser = commands.add_parser("evaluate", help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument("model", metavar="MODEL", help="hub id or folder of a model, or a training's output_dir")
    parser.add_argument(
        "--tasks", metavar="NAME,...", help="benchmarks, or any tasks of lmms-eval (default: the paper's eight)"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder of the results; a rerun finishes a killed run"
    )
    parser.add_argument(
        "--rules",
        choices=("standard", "paper"),
        default="standard",
        help="lmms-eval's prompts and scoring, or the paper's (default: %(default)s)",
    )
    for name, default, text in (
        ("batch-size", 8, "prompts that run at a time, in each process"),
        ("max-new-tokens", 1024, "longest answer where a task names none"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first samples of each task")
    parser.add_argument(
        "--image-seq-length", type=int, metavar="N", help="tokens per image (default: the processor's)"
    )
    parser.add_argument("--device", metavar="NAME", help="as cuda:1 or cpu (default: a GPU where there is one)")
    parser.add_argument(
        "--judge", action="store_true", help="allow tasks that ask an LLM judge over a paid API (OPENAI_API_KEY)"
    )
    parser.add_argument(
        "--include-path",
        action="append",
        default=[],
        metavar="DIR",
        help="folder with YAML files of more tasks; may be repeated",
    )
    _add_few_shot(parser.add_argument_group("base models"))
    parser.set_defaults(run=_run)


def _add_few_shot(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--shots",
        type=numbers,
        metavar="N,...",
        help="evaluate a base model with so many demonstrations, on the five tasks of the paper's Table 5 by default",
    )
    group.add_argument(
        "--seeds",
        type=numbers,
        default=(0, 1, 2),
        metavar="N,...",
        help="with --shots: draws of the demonstrations (default: 0,1,2)",
    )
    group.add_argument(
        "--demonstrations",
        metavar="SPLIT",
        help="with --shots: the split to draw them from (default: the task's training split)",
    )
    group.add_argument(
        "--shot-separator",
        metavar="TEXT",
        help="with --shots: ends a demonstration (default: <|endofchunk|> where the tokenizer has it)",
    )


def numbers(text: str) -> tuple[int, ...]:
    """Read `0,4,8`; named as argparse's message about another text has it."""
    return tuple(int(number) for number in text.split(","))


def _run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from accelerate import PartialState

    from ..evaluation.evaluate import evaluate
    from ..evaluation.few_shot import FewShot

    few_shot = None
    if args.shots is not None:
        few_shot = FewShot(args.shots, args.seeds, args.demonstrations, args.shot_separator)
    elif args.demonstrations is not None or args.shot_separator is not None:
        raise ValueError("--demonstrations and --shot-separator go with --shots")
    evaluate(
        args.model,
        None if args.tasks is None else [name.strip() for name in args.tasks.split(",") if name.strip()],
        args.output,
        rules=args.rules,
        batch_size=args.batch_size,
        limit=args.limit,
        image_seq_length=args.image_seq_length,
        max_new_tokens=args.max_new_tokens,
        judge=args.judge,
        device=args.device,
        include_path=args.include_path,
        few_shot=few_shot,
    )
    if PartialState().is_main_process:
        print((Path(args.output) / "table.md").read_text(encoding="utf-8"), end="")
        print(f"\n{args.output}/results.json")
