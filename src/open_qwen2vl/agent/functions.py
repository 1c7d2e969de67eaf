"""Python functions as tools: what a model is told of them, and calls of them that are checked before they are made."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from ..processing.tool_forms import Call
from ..processing.tool_records import read_tools

Parts = list[dict[str, Any]]
_TYPES = {
    "string": str,
    "integer": int,
    "number": int | float,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


class ToolError(Exception):
    """What a tool raises to tell the model that something went wrong; any other exception ends the run."""


class BadCall(ValueError):
    """A call that is not made, counted under `reason`: `unknown_function` or `bad_arguments`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class Functions:
    """The functions of an agent by their names; `schemas` is what the model reads of them.

    Raises:
        ValueError: for a function without type hints or a docstring that describes its arguments, or two of one name.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]]):
        try:
            self.schemas = read_tools([get_json_schema(tool) for tool in tools])
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise ValueError(f"tools: {error}") from error
        functions = [schema["function"] for schema in self.schemas]
        self._functions = {schema["name"]: (schema, tool) for schema, tool in zip(functions, tools, strict=True)}
        if len(self._functions) < len(functions):
            raise ValueError("tools: two functions of the same name")

    def call(self, call: Call) -> Parts:
        """Make a call and return its result as content; [`BadCall`] if there is no such function or it takes no such
        arguments, [`ToolError`] if the function says so.
        """
        if call.name not in self._functions:
            known = ", ".join(self._functions)
            raise BadCall("unknown_function", f"there is no function {call.name!r}; there are {known}")
        schema, function = self._functions[call.name]
        try:
            inspect.signature(function).bind(**call.arguments)
        except TypeError as error:
            raise BadCall("bad_arguments", f"{call.name}: {error}") from error
        for name, value in call.arguments.items():
            if wrong := mismatch(value, schema["parameters"]["properties"].get(name, {}), name):
                raise BadCall("bad_arguments", f"{call.name}: {wrong}")
        return content(function(**call.arguments))


def mismatch(value: Any, schema: Mapping[str, Any], where: str) -> str:
    """Why a value is not what a schema of `get_json_schema` asks for; empty if it is."""
    if value is None and schema.get("nullable"):
        return ""
    if "anyOf" in schema:
        found = [mismatch(value, one, where) for one in schema["anyOf"]]
        return "" if "" in found else found[0]
    if "enum" in schema and not any(value == one and type(value) is type(one) for one in schema["enum"]):
        return f"{where} is {value!r}, none of {', '.join(map(repr, schema['enum']))}"
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_is_a(value, name) for name in types):
        return f"{where} is a {type(value).__name__}, not {' or '.join(types)}"
    return next(filter(None, _inner_mismatches(value, schema, where)), "")


def _inner_mismatches(value: Any, schema: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, list):
        items = schema.get("prefixItems")
        if items is not None and len(items) != len(value):
            yield f"{where} has {len(value)} items, not {len(items)}"
        items = items if items is not None else [schema.get("items", {})] * len(value)
        for number, (item, one) in enumerate(zip(value, items, strict=False)):
            yield mismatch(item, one, f"{where}[{number}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield mismatch(item, schema.get("additionalProperties") or {}, f"{where}[{name!r}]")


def _is_a(value: Any, name: str) -> bool:
    # JSON's true is no number, though Python's is.
    return isinstance(value, _TYPES.get(name, object)) and (not isinstance(value, bool) or name in ("boolean", "any"))


def content(value: Any) -> Parts:
    """Parts of a message for what a tool or an observation returns.

    Text and images are shown as they are, alone or in a list, None is nothing, and all else is written as JSON.
    """
    values = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(one, str | Image.Image | None) for one in values):
        return [_part(one) for one in values if one is not None]
    try:
        return [_part(json.dumps(value, ensure_ascii=False))]
    except (TypeError, ValueError) as error:
        raise ValueError(f"a tool or an observation gave what is no text, image or JSON: {error}") from error


def _part(value: str | Image.Image) -> dict[str, Any]:
    return {"type": "text", "text": value} if isinstance(value, str) else {"type": "image", "image": value}
