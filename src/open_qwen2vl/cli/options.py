"""From a dataclass of options to the options of a subcommand, and back."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import Any

from ..options import Kind, flag, kinds, read_options, required
from ..places import is_remote


def add_command(commands: "argparse._SubParsersAction", command: ModuleType, config_file: bool = True) -> None:
    """Add a module of this folder: its `OPTIONS` (a dataclass), `SUMMARY`, `run(options)` and perhaps `EPILOG`.

    What is in buckets is refused by a module without a true `BUCKETS`.
    """
    name = command.__name__.rpartition(".")[2].replace("_", "-")
    parser = commands.add_parser(
        name,
        help=command.SUMMARY,
        description=command.SUMMARY[0].upper() + command.SUMMARY[1:] + ".",
        epilog=getattr(command, "EPILOG", None),
    )
    if parser.epilog:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
    groups: dict[str | None, Any] = {None: parser}
    types = kinds(command.OPTIONS)
    for field in fields(command.OPTIONS):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        positional = field.metadata["positional"]
        names = [field.name] if positional else [flag(field.name)]
        groups[title].add_argument(*names, **_arguments(field, types[field.name], config_file))
    if config_file:
        parser.add_argument("--config", metavar="FILE.yaml", help="file with these options; the command line wins")
    parser.set_defaults(run=lambda args: _run(command, _options(parser, command.OPTIONS, vars(args))))


def _run(command: ModuleType, options: Any) -> None:
    if not getattr(command, "BUCKETS", False):
        for name, value in vars(options).items():
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, str) and is_remote(one) and not one.startswith(("http://", "https://", "file://")):
                    raise ValueError(f"{flag(name)} {one}: this command reads and writes files of this machine only")
    command.run(options)


def _arguments(field: Any, kind: Kind, config_file: bool) -> dict[str, Any]:
    """What `add_argument` is called with; an option that is not given leaves nothing behind."""
    positional, form, default = field.metadata["positional"], field.metadata["form"], field.default
    shown = field.metadata["help"].replace("%", "%%")
    if not required(field) and default not in (None, False, ()) and "(default" not in shown:
        listed = ",".join(map(str, default)) if isinstance(default, tuple) else default
        shown += f" (default: {listed})"
    needed = required(field) and not config_file
    if required(field) and config_file:
        shown += " (required)"  # here or in the file
    arguments: dict[str, Any] = {"help": shown, "default": argparse.SUPPRESS}
    if not positional and needed:
        arguments["required"] = True
    if kind.type is bool:
        return arguments | {"action": "store_true"}
    arguments |= {"type": kind.type, "choices": kind.choices, "metavar": field.metadata["metavar"]}
    if kind.many and form == "commas":
        return arguments | {"type": _separated(kind.type)}
    if kind.many and form == "repeated":
        return arguments | {"action": "append"}
    if kind.many:
        return arguments | {"nargs": "*" if positional and not needed else "+"}
    return arguments | ({"nargs": "?"} if positional and not needed else {})


def _separated(kind: type) -> Callable[[str], tuple]:
    def values(text: str) -> tuple:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())

    values.__name__ = f"list of {kind.__name__}"  # of argparse's message
    return values


def _options(parser: argparse.ArgumentParser, options: type, given: dict[str, Any]) -> Any:
    """The dataclass from what the command line gives, and the file that it names."""
    values = read_options(options, given["config"]) if given.get("config") else {}
    for field in fields(options):
        if given.get(field.name) not in (None, []):
            value = given[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    missing = [field for field in fields(options) if required(field) and field.name not in values]
    if missing:
        names = (field.metadata["metavar"] if field.metadata["positional"] else flag(field.name) for field in missing)
        parser.error(f"the following arguments are required: {', '.join(names)}")
    return options(**values)
