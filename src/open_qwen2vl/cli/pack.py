"""`open-qwen2vl pack`: a plan of packs from captions, interleaved documents or conversations."""

import argparse


def add_command(commands: "argparse._SubParsersAction") -> None:
    """Add `pack` to the subcommands."""
    summary = "plan which captions, documents or conversations share a pack (reads texts and headers, no images)"
    parser = commands.add_parser("pack", help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument(
        "shards",
        nargs="*",
        metavar="FILES",
        help="WebDataset tars of captions or of interleaved documents (a json with texts and images in order); .json "
        "or .jsonl of conversations (LLaVA's form or messages) or documents (OBELICS, MMC4); .parquet or a data set "
        "from save_to_disk with messages, with texts and images, or with image and caption; folders of tars, of "
        "parquet or of .jsonl files; or hf://datasets/ORG/NAME[@REVISION][/PATH], which is downloaded to the cache",
    )
    parser.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="DIR_OR_ARCHIVE",
        help="where images are that are named by a path: a folder, an uncompressed .tar or a .zip; may be repeated",
    )
    parser.add_argument("--output", required=True, help="folder of the plan; a rerun finishes what is missing in it")
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="hub id or folder of the model's tokenizer or processor, as Qwen/Qwen2.5-1.5B",
    )
    for name, default, text in (
        ("image-seq-length", 144, "tokens per image"),
        ("max-length", 4096, "positions of a pack"),
        ("shards-per-group", 8, "tars whose samples may share packs"),
        ("records-per-group", 10_000, "conversations, or rows of a table, that may share packs"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument("--max-images", type=int, metavar="N", help="most images of a pack (default: any number)")
    parser.add_argument(
        "--caption-column", metavar="NAME", help="of tables with an image in each row (default: caption, or text)"
    )
    parser.add_argument(
        "--rules",
        choices=("standard", "original"),
        default="standard",
        help="interleaved documents of ten images and more, or longer than a pack, are split before images "
        "(standard), or dropped as by the original code (default: %(default)s)",
    )
    parser.add_argument(
        "--num-workers", type=int, metavar="N", help="processes (default: one per core, at most one per group)"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from tqdm.contrib.logging import logging_redirect_tqdm
    from transformers import AutoTokenizer

    from ..data import find_sources, plan_packs
    from ..model_folders import model_folder
    from ..processing.text_formats import prepare_tokenizer

    shards = find_sources(args.shards)
    try:
        tokenizer = prepare_tokenizer(
            AutoTokenizer.from_pretrained(model_folder(args.tokenizer), trust_remote_code=False)
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"--tokenizer {args.tokenizer}: {error}") from error
    with logging_redirect_tqdm():
        report = plan_packs(
            shards,
            args.output,
            tokenizer,
            image_seq_length=args.image_seq_length,
            max_length=args.max_length,
            max_images=args.max_images,
            shards_per_group=args.shards_per_group,
            images=args.images,
            records_per_group=args.records_per_group,
            caption_column=args.caption_column,
            rules=args.rules,
            num_workers=args.num_workers,
        )
    print(report)
