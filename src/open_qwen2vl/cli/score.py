"""`open-qwen2vl score`: a file of scores for each tar of a pool."""

import argparse

SCORERS = ("clip", "mlm-filter", "metadata", "basic", "image-hash")


def add_command(commands: "argparse._SubParsersAction") -> None:
    """Add `score` to the subcommands."""
    summary = "score image-text pairs, one parquet file for each tar (a rerun makes what is missing)"
    parser = commands.add_parser("score", help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument(
        "pool",
        nargs="+",
        metavar="POOL",
        help="WebDataset tars of captions, or folders of them; with --scorer metadata: parquet files of DataComp's "
        "form, or folders of them",
    )
    parser.add_argument(
        "--scorer",
        required=True,
        choices=SCORERS,
        help="clip: cosine similarity by a model of open_clip; mlm-filter: what an image-text-to-text model answers; "
        "metadata: columns of the pool's tables; basic: words, characters, smaller_side, aspect_ratio and english; "
        "image-hash: what the filter finds duplicates by",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the scores go to DIR/NAME/TAR.parquet")
    parser.add_argument("--name", metavar="NAME", help="what the filter calls the scores (default: the scorer)")
    _add_scorer_options(parser.add_argument_group("of one scorer"))
    work = parser.add_argument_group("how it is run")
    work.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="clip, mlm-filter: threads that decode for a model; others: processes (default: one per core)",
    )
    work.add_argument("--engine", choices=("local", "ray"), default="local", help="where (default: %(default)s)")
    work.add_argument(
        "--gpus-per-worker",
        type=float,
        metavar="X",
        help="of each Ray actor with a model (default: 1; --device cpu: 0)",
    )
    parser.set_defaults(run=_run)


def _add_scorer_options(group: argparse._ArgumentGroup) -> None:
    for flag, metavar, text in (
        ("model", "M", "clip: a name of open_clip, hf-hub:ORG/NAME or local-dir:DIR; mlm-filter: hub id or folder"),
        ("pretrained", "TAG_OR_FILE", "clip: weights of a model that is given by its name"),
        ("prompts", "FILE.yaml", "mlm-filter: the wording that a model was trained with"),
        ("device", "DEVICE", "clip, mlm-filter: as cpu or cuda:1 (default: the GPU, if there is one)"),
    ):
        group.add_argument(f"--{flag}", metavar=metavar, help=text)
    group.add_argument(
        "--metric",
        action="append",
        metavar="NAME",
        help="mlm-filter: image_text_matching, object_detail_fulfillment, caption_text_quality, "
        "semantic_understanding or all; may be repeated (default: all)",
    )
    group.add_argument(
        "--decode", choices=("expectation", "greedy"), help="mlm-filter: how a score is read (default: expectation)"
    )
    group.add_argument("--columns", metavar="A,B", help="metadata: columns of the tables")
    group.add_argument("--batch-size", type=int, metavar="N", help="clip, mlm-filter: pairs scored together")


def _run(args: argparse.Namespace) -> None:
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ..data.scoring import score_pool

    columns = [column.strip() for column in args.columns.split(",")] if args.columns else None
    with logging_redirect_tqdm():
        report = score_pool(
            args.pool,
            args.output,
            args.scorer,
            name=args.name,
            num_workers=args.num_workers,
            engine=args.engine,
            gpus_per_worker=args.gpus_per_worker,
            model=args.model,
            pretrained=args.pretrained,
            metric=args.metric,
            prompts=args.prompts,
            decode=args.decode,
            columns=columns,
            batch_size=args.batch_size,
            device=args.device,
        )
    print(report)
