"""`open-qwen2vl evaluate`: benchmarks by lmms-eval."""

from ..evaluation.options import EvaluateOptions as OPTIONS

SUMMARY = "score a model on benchmarks with lmms-eval"


def run(options: OPTIONS) -> None:
    """Evaluate, and print the table."""
    from pathlib import Path

    from accelerate import PartialState

    from ..evaluation.evaluate import evaluate
    from ..evaluation.few_shot import FewShot

    few_shot = None
    if options.shots is not None:
        few_shot = FewShot(options.shots, options.seeds, options.demonstrations, options.shot_separator)
    evaluate(
        options.model,
        options.tasks,
        options.output,
        rules=options.rules,
        batch_size=options.batch_size,
        limit=options.limit,
        image_seq_length=options.image_seq_length,
        max_new_tokens=options.max_new_tokens,
        judge=options.judge,
        device=options.device,
        include_path=options.include_path,
        few_shot=few_shot,
    )
    if PartialState().is_main_process:
        print((Path(options.output) / "table.md").read_text(encoding="utf-8"), end="")
        print(f"\n{options.output}/results.json")
