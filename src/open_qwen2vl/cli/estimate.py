"""`open-qwen2vl estimate`: what a recipe costs."""

import argparse


def add_command(commands: "argparse._SubParsersAction") -> None:
    """Add `estimate` to the subcommands."""
    summary = "tell memory, speed, hours and cost of a recipe on a kind of GPU (reads configs and plans, no weights)"
    parser = commands.add_parser("estimate", help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument("config", metavar="CONFIG.yaml", help="options of recipes/pretrain.py")
    parser.add_argument("--gpu", required=True, metavar="KIND", help="as h100, a100-40gb, rtx4090")
    parser.add_argument("--pairs", type=float, metavar="N", help="image-text pairs, instead of the recipe's packs")
    for name, kind, default, text in (
        ("num-gpus", int, 1, "data-parallel GPUs"),
        ("mfu", float, 0.5, "share of the peak to reckon with, 0 to 1"),
        ("tokens-per-pair", float, 176.0, "with --pairs: mean tokens of a pair, its images included"),
        ("images-per-pair", float, 1.0, "with --pairs: mean images of a pair"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument("--price-per-hour", type=float, metavar="X", help="dollars for a GPU-hour (default: a list's)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    import json

    from ..estimate.estimate import estimate_run
    from ..estimate.inputs import assumed_work, planned_work, read_config, read_recipe

    options = read_recipe(args.config)
    config = read_config(options)
    if args.pairs is None:
        work = planned_work(options.get("train_packs"))
    else:
        work = assumed_work(args.pairs, args.tokens_per_pair, args.images_per_pair, config.image_seq_length)
    result = estimate_run(options, config, work, args.gpu, args.num_gpus, args.mfu, args.price_per_hour)
    print(json.dumps(result.as_dict(), indent=1) if args.json else result)
