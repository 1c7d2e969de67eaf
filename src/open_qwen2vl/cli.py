"""The command `open-qwen2vl`: one subcommand for each step of the data pipeline.

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
    parser = _Parser(prog="open-qwen2vl", description="Data steps of Open-Qwen2VL.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_pack(commands)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        first_line = str(error).strip().split("\n")[0]
        print(f"{parser.prog} {args.command}: error: {first_line}", file=sys.stderr)
        return 2
    return 0


def _add_pack(commands) -> None:
    summary = "plan which captions share a pack (reads texts and headers, no images)"
    parser = commands.add_parser("pack", help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument("shards", nargs="*", metavar="SHARDS", help="WebDataset tars, or folders that hold *.tar")
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
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--num-workers", type=int, metavar="N", help="processes (default: one per core, at most one per group of tars)"
    )
    parser.set_defaults(run=_pack)


def _pack(args: argparse.Namespace) -> None:
    from tqdm.contrib.logging import logging_redirect_tqdm
    from transformers import AutoTokenizer

    from .data import find_shards, plan_packs
    from .processing.text_formats import prepare_tokenizer

    shards = find_shards(args.shards)
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(args.tokenizer))
    with logging_redirect_tqdm():
        report = plan_packs(
            shards,
            args.output,
            tokenizer,
            image_seq_length=args.image_seq_length,
            max_length=args.max_length,
            shards_per_group=args.shards_per_group,
            num_workers=args.num_workers,
        )
    print(report)


if __name__ == "__main__":
    sys.exit(main())
