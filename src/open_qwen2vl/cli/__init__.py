"""The command `open-qwen2vl`: one subcommand for each step from data to model, each a module of this folder.

What a user can get wrong (`ValueError`, `OSError`) ends in one line and exit code 2, Ctrl-C in exit code 130. The
libraries of a step are imported when it runs, so that `--help` is quick.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from . import (
    boxes,
    chat,
    convert,
    decontaminate,
    demo,
    estimate,
    evaluate,
    export,
    extract_frames,
    filter,
    init_vit,
    mix,
    pack,
    recaption,
    report,
    reshard,
    score,
)
from .interrupt import INTERRUPTED, ended_by_ctrl_c
from .options import add_command

# In the order of --help.
COMMANDS = (
    *(score, recaption, decontaminate, filter, reshard, extract_frames, boxes, pack),
    *(mix, convert, export, init_vit, estimate, chat, evaluate, report, demo),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """End with one line instead of the whole usage."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv (`Sequence[str]`, *optional*): its arguments; those of the process where not given.

    Returns:
        `int`: exit code, 0 if all went well, 2 after an error of the user's making, 130 after Ctrl-C.
    """
    name = "open-qwen2vl"
    try:
        args = _parse(argv)
        name = f"{name} {args.command}"
        with ended_by_ctrl_c(watched=args.command != "chat" or not sys.stdin.isatty()):  # there it ends an answer
            from tqdm.contrib.logging import logging_redirect_tqdm

            with logging_redirect_tqdm():
                args.run(args)
    except (ValueError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="open-qwen2vl", description="Steps around the training of Open-Qwen2VL.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        # Those for people alone, and that which reads a recipe, have no file of options.
        add_command(commands, command, config_file=command not in (chat, demo, estimate))
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    return args
