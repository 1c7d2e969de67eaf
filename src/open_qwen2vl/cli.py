"""The command `open-qwen2vl`: one subcommand for each step from data to model.

What a user can get wrong (`ValueError`, `OSError`) ends in one line and exit code 2. The libraries of a step are
imported when it runs, so that `--help` is quick.
"""

import argparse
import logging
import sys
from collections.abc import Sequence


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """End with one line instead of the whole usage."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv (`Sequence[str]`, *optional*): its arguments; those of the process where not given.

    Returns:
        `int`: exit code, 0 if all went well and 2 after an error of the user's making.
    """
    parser = _Parser(prog="open-qwen2vl", description="Steps around the training of Open-Qwen2VL.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_pack(commands)
    _add_convert(commands)
    _add_chat(commands)
    _add_estimate(commands)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"{parser.prog} {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _add_pack(commands) -> None:
    summary = "plan which captions or conversations share a pack (reads texts and headers, no images)"
    parser = commands.add_parser("pack", help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument(
        "shards",
        nargs="*",
        metavar="FILES",
        help="WebDataset tars of captions; or conversations: .json or .jsonl (LLaVA's form or messages), .parquet or "
        "a data set from save_to_disk (messages, images); or folders of tars or of parquet files",
    )
    parser.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="DIR_OR_ARCHIVE",
        help="where conversations' images are: a folder, an uncompressed .tar or a .zip; may be repeated",
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
        ("records-per-group", 10_000, "conversations that may share packs"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument("--max-images", type=int, metavar="N", help="most images of a pack (default: any number)")
    parser.add_argument(
        "--num-workers", type=int, metavar="N", help="processes (default: one per core, at most one per group)"
    )
    parser.set_defaults(run=_pack)


def _pack(args: argparse.Namespace) -> None:
    from tqdm.contrib.logging import logging_redirect_tqdm
    from transformers import AutoTokenizer

    from .data import find_sources, plan_packs
    from .processing.text_formats import prepare_tokenizer

    shards = find_sources(args.shards)
    try:
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(args.tokenizer))
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
            num_workers=args.num_workers,
        )
    print(report)


def _add_convert(commands) -> None:
    summary = "make a folder for the Auto classes from a checkpoint of the original code"
    parser = commands.add_parser("convert", help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument(
        "source", metavar="ORIGINAL_DIR", help="holds config.json and checkpoints/latest-checkpoint.pt"
    )
    parser.add_argument("output", metavar="OUT_DIR", help="folder to make")
    parser.add_argument(
        "--text-model",
        metavar="ID_OR_DIR",
        help="hub id or folder of the language model's config and tokenizer, as Qwen/Qwen2.5-1.5B-Instruct",
    )
    parser.add_argument(
        "--vision-weights",
        metavar="FILE_OR_TIMM_ID",
        help="SigLIP with timm's names (default: the checkpoint's own, or else hf-hub:timm/ViT-SO400M-14-SigLIP-384)",
    )
    parser.add_argument(
        "--vision-heads", type=int, metavar="N", help="attention heads of a vision tower of unusual width"
    )
    parser.add_argument(
        "--to-original",
        action="store_true",
        help="the other way: ORIGINAL_DIR is a model's folder, OUT_DIR gets the original's layout",
    )
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    from .convert import convert_checkpoint, convert_to_original

    if args.to_original:
        if args.text_model or args.vision_heads:
            raise ValueError("--to-original takes no --text-model and no --vision-heads: the model's folder has both")
        print(convert_to_original(args.source, args.output, args.vision_weights))
        return
    if not args.text_model:
        raise ValueError("--text-model is required (a hub id or folder, as Qwen/Qwen2.5-1.5B-Instruct)")
    print(convert_checkpoint(args.source, args.output, args.text_model, args.vision_weights, args.vision_heads))


def _add_chat(commands) -> None:
    summary = "talk with a model in the terminal"
    parser = commands.add_parser("chat", help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument("model", metavar="MODEL", help="hub id or folder of a model, or a training's output_dir")
    parser.add_argument("--image", action="append", metavar="FILE", help="image of the first message; may be repeated")
    parser.add_argument(
        "--image-seq-length", type=int, metavar="N", help="tokens per image (default: the processor's)"
    )
    for name, kind, default, text in (
        ("max-new-tokens", int, 512, "longest answer"),
        ("temperature", float, 0.0, "of sampling; 0 takes the likeliest token"),
    ):
        shown = f"{text} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=shown)
    parser.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> None:
    from .chat import chat

    chat(args.model, args.image, args.image_seq_length, args.max_new_tokens, args.temperature)


def _add_estimate(commands) -> None:
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
    parser.set_defaults(run=_estimate)


def _estimate(args: argparse.Namespace) -> None:
    import json

    from .trainer.estimate import estimate_run
    from .trainer.estimate_inputs import assumed_work, planned_work, read_config, read_recipe

    options = read_recipe(args.config)
    config = read_config(options)
    if args.pairs is None:
        work = planned_work(options.get("train_packs"))
    else:
        work = assumed_work(args.pairs, args.tokens_per_pair, args.images_per_pair, config.image_seq_length)
    result = estimate_run(options, config, work, args.gpu, args.num_gpus, args.mfu, args.price_per_hour)
    print(json.dumps(result.as_dict(), indent=1) if args.json else result)


if __name__ == "__main__":
    sys.exit(main())
