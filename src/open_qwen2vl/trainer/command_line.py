"""The command line of a recipe: a YAML file of options, then options that win over it; each mistake is one line."""

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        """End with one line instead of the usage, which has a page of options."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def destinations(self) -> dict[str, list[Any]]:
        """The actions of every option by its name (a switch that is on by default has a second, `--no_...`)."""
        actions: dict[str, list[Any]] = {}
        for action in self._actions:
            if action.option_strings and action.dest != "help":
                actions.setdefault(action.dest, []).append(action)
        return actions

    def unknown(self, option: str, where: str = "") -> None:
        """End with the option's name and the nearest known one."""
        name = option.lstrip("-").split("=")[0].replace("-", "_")
        near = difflib.get_close_matches(name, self.destinations(), n=1)
        self.error(f"{where}unknown option {option!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))

    def read_defaults(self, path: str) -> None:
        """Take the options of a YAML file as defaults, read as the command line's are."""
        try:
            options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"cannot read {path}: {' '.join(str(error).split())}")
        if not isinstance(options, dict):
            self.error(f"{path}: not a YAML file of `option: value` lines")
        known = self.destinations()
        for name, value in options.items():
            if name not in known:
                self.unknown(str(name), f"{path}: ")
            for action in known[name]:
                # As a string, so that argparse converts it: YAML takes 5e-5 for a word.
                action.default = str(value) if isinstance(value, bool | int | float | str) else value
                action.required = False


def parse_arguments(
    dataclasses: Sequence[type], description: str, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """Arguments of a recipe from `CONFIG.yaml --option value ...`; an option on the command line wins.

    Args:
        dataclasses (`Sequence[type]`): their fields are the options.
        description (`str`): shown by `--help`.
        argv (`Sequence[str]`, *optional*): the command line; the process's by default.

    Returns:
        `tuple`: an instance of each dataclass. A wrong file, option or value ends the process with one line and exit
        code 2.
    """
    parser = _Parser(
        dataclasses, description=description, usage="%(prog)s [CONFIG.yaml] [--option value ...]", allow_abbrev=False
    )
    options = list(sys.argv[1:] if argv is None else argv)
    if options and not options[0].startswith("-"):
        parser.read_defaults(options.pop(0))
    for option in options:
        # Before anything else, or a mistyped option would be reported as another one that is missing.
        if option.startswith("--") and option.split("=")[0] not in parser._option_string_actions:
            parser.unknown(option)
    try:
        *parsed, unused = parser.parse_args_into_dataclasses(
            options, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    if unused:
        parser.error(f"{unused[0]!r} is no option")
    return tuple(parsed)
