"""`open-qwen2vl evaluate`: benchmarks by lmms-eval."""

from ..evaluation.options import EvaluateOptions as OPTIONS

SUMMARY = "score a model on benchmarks with lmms-eval"
BUCKETS = True


def run(options: OPTIONS) -> None:
    """Evaluate, and print the table."""
    from accelerate import PartialState

    from ..evaluation.evaluate import evaluate
    from ..evaluation.few_shot import FewShot
    from ..places import place

    shared = {
        "batch_size": options.batch_size,
        "limit": options.limit,
        "max_new_tokens": options.max_new_tokens,
        "judge": options.judge,
        "include_path": options.include_path,
    }
    few_shot = None
    if options.shots is not None:
        few_shot = FewShot(options.shots, options.seeds, options.demonstrations, options.shot_separator)
    if options.endpoint is not None:
        from ..evaluation.harness import import_harness

        import_harness()  # its absence is one line
        from ..evaluation.endpoint import evaluate_endpoint

        evaluate_endpoint(options.endpoint, options.tasks, options.output, model=options.endpoint_model, **shared)
    else:
        evaluate(
            options.model,
            options.tasks,
            options.output,
            rules=options.rules,
            image_seq_length=options.image_seq_length,
            device=options.device,
            few_shot=few_shot,
            **shared,
        )
    if PartialState().is_main_process:
        print((place(options.output) / "table.md").read_text(encoding="utf-8"), end="")
        print(f"\n{options.output}/results.json")
