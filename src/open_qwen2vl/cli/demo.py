"""`open-qwen2vl demo`: a conversation in the browser."""

import argparse


def add_command(commands: "argparse._SubParsersAction") -> None:
    """Add `demo` to the subcommands."""
    summary = "talk with a model in the browser"
    parser = commands.add_parser("demo", help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument("model", metavar="MODEL", help="hub id or folder of a model, or a training's output_dir")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--image-seq-length", type=int, metavar="N", help="tokens per image at the start (default: the processor's)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        metavar="N",
        help="longest answer at the start (default: %(default)s)",
    )
    parser.add_argument(
        "--examples", metavar="DIR", help="images to offer; FILE.txt beside an image has the question to ask of it"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from ..chat.demo import serve_demo

    serve_demo(args.model, args.host, args.port, args.image_seq_length, args.max_new_tokens, args.examples)
