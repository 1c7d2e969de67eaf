"""The command line of a recipe: a YAML file of options, then options that win over it; each mistake is one line."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .yaml_options import YamlOptionsError, plain_value, read_options

NESTED = ("train_packs", "eval_packs")  # a folder, or in a YAML file a list of sources

# What other trainers call their data.
_DATA = ("dataset_name", "dataset", "dataset_path", "data_path", "data_files", "train_file", "train_data")


class _Parser(HfArgumentParser):
    def __init__(self, dataclasses: Sequence[type], **kwargs):
        # The parent class replaces the types of the fields.
        self.hints = {name: hint for kind in dataclasses for name, hint in get_type_hints(kind).items()}
        super().__init__(dataclasses, **kwargs)
        for action in self._actions:
            if action.type is string_to_bool and action.nargs is None:  # of `bool | None`: the name alone is true, too
                action.nargs, action.const = "?", True

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
        if name in _DATA and "train_packs" in self.destinations():
            self.error(
                f"{where}unknown option {option!r}: data are planned first, `open-qwen2vl pack DATA --output PACKS`; "
                "then give --train_packs PACKS"
            )
        near = difflib.get_close_matches(name, self.destinations(), n=1)
        self.error(f"{where}unknown option {option!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))

    def read_defaults(self, path: str) -> None:
        """Take the options of a YAML file as defaults, read as the command line's are."""
        known = self.destinations()
        try:
            nodes = read_options(path)
            for name, node in nodes.items():
                if name not in known:
                    self.unknown(str(name), f"{path}: ")
                value = self._default(name, known[name][0], plain_value(node))
                for action in known[name]:
                    action.default = value
                    action.required = False
        except YamlOptionsError as error:
            text = str(error)
            self.error(text if path in text else f"{path}: {name}: {text}")

    def _default(self, name: str, action: argparse.Action, value: Any) -> Any:
        """A value of the file as argparse's default: text, which it converts, or what has a structure."""
        hint = self.hints[name]
        if value is None:
            if "None" not in str(hint):
                raise YamlOptionsError("needs a value")
            return None
        if isinstance(value, str):
            # YAML 1.1 has more words for a boolean than the parser.
            truth = {"on": "true", "off": "false"}.get(value.lower(), value)
            if value.lower() in ("no", "off", "false") and "no" in (action.choices or ()):
                return "no"
            return truth if action.type is string_to_bool else value
        if action.nargs in ("+", "*") and isinstance(value, list):
            convert = action.type or str
            return [convert(item if isinstance(item, str) else str(item)) for item in value]
        if name in NESTED or "dict" in str(hint) or "list" in str(hint):
            return value
        raise YamlOptionsError(f"takes one value, got {type(value).__name__} {value!r}"[:200])


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
    except (ValueError, TypeError, ImportError, OSError) as error:
        # What the arguments' own classes refuse, `fsdp_config` that is no file and a missing library among them.
        parser.error(" ".join(str(error).split()))
    if unused:
        parser.error(f"{unused[0]!r} is no option")
    return tuple(parsed)
