"""Options of a command: the fields of a frozen dataclass, for the command line, a YAML file and Python alike.

    @dataclass(frozen=True)
    class PackOptions:
        shards: tuple[str, ...] = option(help="tars", positional=True)
        max_length: int = option(4096, help="positions of a pack", metavar="N")

The dataclass lies beside the step that it is of and imports nothing heavy: `cli/options.py` reads it for every help.
Fields are of `bool`, `int`, `float`, `str`, a `Literal` of texts, a tuple of one of these, or any of them or None.
"""

import os
import types
import typing
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, Literal

_MAX_BYTES = 1 << 20  # of a YAML file
_MAX_NODES = 100_000  # with every alias counted as often as it stands


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
    content = load_yaml(f"--config {path}", path)
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
            raise ValueError(f"--config {path}: {name}: {repr(value)[:200]} is no value for it") from None
    return found


def load_yaml(what: str, path: str | os.PathLike) -> Any:
    """The values of a YAML file; a `ValueError` of one line that begins with `what`."""
    import yaml

    loader = yaml.SafeLoader("")
    try:
        root = compose_yaml(what, path)
        return None if root is None else loader.construct_document(root)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def compose_yaml(what: str, path: str | os.PathLike) -> Any:
    """The root node of a YAML file: nothing is built or run, and what aliases would expand to is bounded."""
    import yaml

    try:
        if Path(path).stat().st_size > _MAX_BYTES:
            raise ValueError(f"{what}: it is larger than 1 MiB, which no file of options is")
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if root is not None and _expanded_size(root, {}) > _MAX_NODES:
            raise ValueError(f"{what}: its aliases stand for more than {_MAX_NODES:,} values")
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError(f"{what}: nested too deeply") from None
    return root


def _expanded_size(node: Any, sizes: dict[int, float]) -> float:
    """Nodes below and with one, aliases followed; infinite where one stands for itself."""
    if node.id == "scalar":
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")  # until it is known
        children = [child for pair in node.value for child in pair] if node.id == "mapping" else node.value
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


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
