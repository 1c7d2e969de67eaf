"""Tools in records of conversations, in Hugging Face's form: the functions that may be called, and the calls.

    "tools"        [{"type": "function", "function": {"name", "description", "parameters": a JSON schema}}]
    "tool_calls"   of a turn: [{"type": "function", "function": {"name", "arguments": an object}}]

or the functions alone. Each of them, its entries and the arguments may be JSON text, as tables have it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from .sample_error import SampleError


def read_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools of a record as they are, `bad_tools` if one has no name."""
    found = _entries(tools, "tools")
    for tool in found:
        checked_name(_function(tool), "tools")
        _dump(tool, "tools")
    return found


def read_calls(calls: Any) -> list[dict[str, str]]:
    """The calls of a turn as `name`, `arguments`, the text of a JSON object, and perhaps `id`; or `bad_tool_calls`."""
    found = []
    for entry in _entries(calls, "tool_calls"):
        function = _function(entry)
        arguments = function.get("arguments")
        written = arguments if isinstance(arguments, str) else _dump(arguments or {}, "tool_calls")
        if not isinstance(parse_json(written, "tool_calls"), dict):
            raise SampleError("bad_tool_calls", f"the arguments of {function.get('name')!r} are no JSON object")
        own_id = {"id": str(entry["id"])} if entry.get("id") else {}
        found.append({"name": checked_name(function, "tool_calls"), "arguments": written, **own_id})
    return found


def order_results(messages: list[dict[str, Any]], media: Sequence[Any]) -> list[Any]:
    """Put results that name their calls (`tool_call_id`) in the order of these, in which they are written and shown.

    Returns the media of all messages, which are those of the order before, in the new one.
    """
    rest = iter(media)
    own = {id(one): [next(rest) for part in one["content"] if part["type"] in ("image", "video")] for one in messages}
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            ids = [call.pop("id", None) for call in message.get("tool_calls", ())]
            results = list(takewhile(lambda one: one["role"] == "tool", messages[number + 1 :]))
            messages[number + 1 : number + 1 + len(results)] = _ordered(results, ids)
    return [one for message in messages for one in own[id(message)]]


def _ordered(results: list[dict[str, Any]], ids: list[str | None]) -> list[dict[str, Any]]:
    named = [result.pop("tool_call_id", None) for result in results]
    if not any(named) or not any(ids):
        return results
    if len(set(ids)) < len(ids) or len(set(named)) < len(named) or not set(named) <= set(ids):
        raise SampleError("bad_tool_results", f"results of the calls {named}, where {ids} were made")
    return [results[named.index(one)] for one in ids if one in named]


def checked_name(function: Mapping[str, Any], what: str) -> str:
    """A function's name, which chat templates write between quotes as it is."""
    name = function.get("name")
    if not isinstance(name, str) or not name.strip() or json.dumps(name, ensure_ascii=False) != f'"{name}"':
        raise SampleError(f"bad_{what}", f"{name!r} is no name of a function")
    return name


def parse_json(text: str, what: str) -> Any:
    """What a JSON text says; `NaN` and its like are none."""
    try:
        text.encode()
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"bad_{what}", f"{what} are no JSON: {error}") from error


def _entries(listed: Any, what: str) -> list[Any]:
    listed = parse_json(listed, what) if isinstance(listed, str) and listed.strip() else listed
    if not listed:
        return []
    if not isinstance(listed, Iterable) or isinstance(listed, str | Mapping):
        raise SampleError(f"bad_{what}", f"{what} are a {type(listed).__name__}, no list")
    entries = [parse_json(entry, what) if isinstance(entry, str) else entry for entry in listed]
    if wrong := [entry for entry in entries if not isinstance(entry, Mapping)]:
        raise SampleError(f"bad_{what}", f"one of {what} is a {type(wrong[0]).__name__}")
    return entries


def _function(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    function = entry.get("function") or entry
    return function if isinstance(function, Mapping) else {}


def _dump(value: Any, what: str) -> str:
    """As chat templates write it (`tojson` of transformers)."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise SampleError(f"bad_{what}", f"{what} cannot be written as JSON: {error}") from error
    return text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
