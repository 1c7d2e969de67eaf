"""`open-qwen2vl chat`: a conversation in the terminal."""

import argparse


def add_command(commands: "argparse._SubParsersAction") -> None:
    """Add `chat` to the subcommands."""
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
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from ..chat.terminal import chat

    chat(args.model, args.image, args.image_seq_length, args.max_new_tokens, args.temperature)
