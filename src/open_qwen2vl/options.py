"""Options of a command: the fields of a frozen dataclass, for the command line, a YAML file and Python alike.

    @dataclass(frozen=True)
    class PackOptions:
        shards: tuple[str, ...] = option(help="tars", positional=True)
        max_length: int = option(4096, help="positions of a pack", metavar="N")

The dataclass lies beside the step that it is of and imports nothing heavy: `cli/options.py` reads it for every help.
Fields are of `bool`, `int`, `float`, `str`, a `Literal` of texts, a tuple of one of these, or any of them or None.
"""

import types
import typing
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, Literal


def option(
    default: Any = MISSING,
    *,
    help: str,
    metavar: str | None = None,
    positional: bool = False,
    form: Literal["many", "repeated", "commas"] = "many",
    group: str | None = None,
) -> Any:
    """A field of options; `form` is how a tuple is written: `--a X Y`, `--a X --a Y` or `--a X,Y`."""
    metadata = {"help": help, "metavar": metavar, "positional": positional, "form": form, "group": group}
    return field(default=default, metadata=metadata)


class Kind(typing.NamedTuple):
    """The type of a field, taken apart: of its entries where it is a tuple."""

    type: type
    choices: tuple[str, ...] | None
    many: bool
    optional: bool


def kinds(options: type) -> dict[str, Kind]:
    """The kind of each field of a dataclass of options."""
    hints = typing.get_type_hints(options)
    return {each.name: _kind(hints[each.name]) for each in fields(options)}


def _kind(hint: Any) -> Kind:
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    many = typing.get_origin(hint) is tuple
    if many:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Literal:
        return Kind(str, typing.get_args(hint), many, optional)
    return Kind(hint, None, many, optional)


def required(each: Field) -> bool:
    """Whether a field has no default."""
    return each.default is MISSING


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def read_options(options: type, path: str) -> dict[str, Any]:
    """The fields of a dataclass of options that a YAML file names, of the types that the command line gives them."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: not a file of `option: value` lines")
    known, found = kinds(options), {}
    for name, value in content.items():
        key = str(name).replace("-", "_")
        if key not in known:
            raise ValueError(f"--config {path}: no option {name!r}; there are {', '.join(known)}")
        try:
            found[key] = _read(known[key], value)
        except TypeError:
            raise ValueError(f"--config {path}: {name}: {value!r} is no value for it") from None
    return found


def _read(kind: Kind, value: Any) -> Any:
    if value is None and kind.optional:
        return None
    if kind.many:
        single = kind._replace(many=False, optional=False)
        return tuple(_read(single, entry) for entry in (value if isinstance(value, list) else [value]))
    if kind.type is float and type(value) is int:
        value = float(value)
    if type(value) is not kind.type or kind.choices and value not in kind.choices:
        raise TypeError
    return value
