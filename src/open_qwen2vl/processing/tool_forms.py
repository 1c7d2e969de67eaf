r"""Calls of functions as text, in two forms, and back by json alone.

    tool_call  today's, byte for byte what Qwen3-VL's chat template writes: `<tools>` in the system turn, `<tool_call>`
               in the assistant's, results in the user's as `<tool_response>`
    function   that of Qwen2-VL's article: `*FUNCTION*: name`, `*ARGS*: {json}`, `*RESULT*: ...`, `*RETURN*: answer`
               in one turn of the assistant, of which the results are not learned

Either way the messages become plain ones of system, user and assistant, which every chat template takes.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from .sample_error import SampleError
from .tool_records import read_calls

Message = dict[str, Any]
ToolForm = Literal["tool_call", "function"]
TOOL_FORMS: tuple[ToolForm, ...] = ("tool_call", "function")
# What ends a model's call. JSON has no line break within a string: at the start of a line it is never an argument's.
STOPS = {"tool_call": "\n</tool_call>", "function": "\n*RESULT*:"}
_MARKERS = {"tool_call": ("<tool_call>", "<tools>"), "function": ("*FUNCTION*:", "*RESULT*:")}
_BEGINS = {
    "tool_call": re.compile(r"<tool_call>\s*"),
    "function": re.compile(r"^\*FUNCTION\*:[ \t]*(?P<name>[^\n]*?)[ \t]*\n\*ARGS\*:\s*", re.MULTILINE),
}
_SIGNS = {"tool_call": re.compile("</?tool_call>"), "function": re.compile(r"^\*(FUNCTION|ARGS)\*", re.MULTILINE)}
_RETURN = "*RETURN*:"

_TOOL_CALL_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
# As Qwen-Agent described them to Qwen2 and Qwen2-VL, with the article's signs.
_FUNCTION_TOOLS = """# Tools

## You have access to the following tools:

{tools}

## When you need to call a tool, please insert the following command in your reply, which can be called zero or \
multiple times according to your needs:

*FUNCTION*: The tool to use, should be one of [{names}]
*ARGS*: The input of the tool
*RESULT*: Tool results
*RETURN*: Reply based on tool results"""


class Call(NamedTuple):
    """A call that a model wrote: the name of a function, and its arguments as JSON has them."""

    name: str
    arguments: dict[str, Any]


def plain_messages(
    messages: list[Message], tools: Sequence[Mapping[str, Any]], form: ToolForm, default_system: str = ""
) -> list[Message]:
    """Messages with calls and results as text; those of a conversation without tools are returned as they are.

    Args:
        messages (`list[dict]`): of the normal form of `conversation_records.py`.
        tools (`Sequence[Mapping]`): as [`read_tools`] gives them; described behind the system prompt.
        form (`str`): `"tool_call"` or `"function"`.
        default_system (`str`): what the chat template says where there is no system turn, which the description is put
            behind.

    Raises:
        SampleError: `ambiguous_tools` for texts that write calls by themselves; `parallel_calls` for those that the
            form `function` cannot show, several at once or without one result each.
    """
    if not uses_tools(messages, tools):
        return messages
    texts = (part.get("text", "") for message in messages if message["role"] in ("system", "assistant")
             and message.get("train", True) for part in message["content"])  # fmt: skip
    if written := next((marker for text in texts for marker in _MARKERS[form] if marker in text), None):
        raise SampleError("ambiguous_tools", f"a text has {written} beside tools or calls of the record")
    if tools:
        messages = _with_system(messages, _described(tools, form), default_system)
    return list((_with_tool_calls if form == "tool_call" else _with_functions)(messages))


def uses_tools(messages: Iterable[Message], tools: Any) -> bool:
    """Whether a conversation has tools, calls or results."""
    return bool(tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def parse_calls(text: str, form: ToolForm) -> tuple[str, list[Call]]:
    """What stands before the first call of an answer, without `*RETURN*:`, and its calls.

    Raises:
        ValueError: for a call that cannot be read, saying what is wrong with it. Nothing is evaluated.
    """
    calls, end, prose = [], 0, None
    while begin := _BEGINS[form].search(text, end):
        prose = text[: begin.start()] if prose is None else prose
        value, end = _decode(text, begin.end())
        call = {"name": begin["name"], "arguments": value} if form == "function" else value
        calls.append(_checked(call))
        closing = STOPS[form].strip()
        if not text[end:].lstrip().startswith(closing):
            raise ValueError(f"{closing} does not follow the JSON object of the call")
    prose = (text if prose is None else prose).strip()
    rest = text[end:].lstrip().removeprefix(STOPS[form].strip()) if calls else text
    if _SIGNS[form].search(rest) or any(marker in prose for marker in _MARKERS[form]):
        raise ValueError(f"no call can be read in it; it is written as {_example(form)!r}")
    return (prose.removeprefix(_RETURN).strip() if form == "function" else prose), calls


def written_calls(calls: Iterable[Mapping[str, str]], form: ToolForm) -> str:
    """Calls (`name`, and `arguments` as JSON text) as a model writes them."""
    if form == "tool_call":
        written = (f'{{"name": "{call["name"]}", "arguments": {call["arguments"]}}}' for call in calls)
        return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in written)
    return "\n".join(f"*FUNCTION*: {call['name']}\n*ARGS*: {call['arguments']}\n*RESULT*:" for call in calls)


def _example(form: ToolForm) -> str:
    return written_calls([{"name": "NAME", "arguments": "{...}"}], form)


def _decode(text: str, start: int) -> tuple[Any, int]:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.JSONDecoder(parse_constant=refuse).raw_decode(text, start)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _checked(call: Any) -> Call:
    name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, dict) else (None, None)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("a call needs the name of a function and a JSON object of arguments")
    read_calls([{"name": name, "arguments": arguments}])  # 1e999 and "\ud800" are read by json, and not written again
    return Call(name, arguments)


def _described(tools: Sequence[Mapping[str, Any]], form: ToolForm) -> str:
    if form == "tool_call":
        return _TOOL_CALL_TOOLS.format(tools="".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools))
    functions = [tool.get("function") or tool for tool in tools]
    described = [
        f"### {function['name']}\n\n{function['name']}: {function.get('description') or ''} Parameters: "
        + json.dumps(function.get("parameters") or {}, ensure_ascii=False)
        for function in functions
    ]
    names = ",".join(function["name"] for function in functions)
    return _FUNCTION_TOOLS.format(tools="\n\n".join(described), names=names)


def _with_system(messages: list[Message], described: str, default_system: str) -> list[Message]:
    own = messages[0]["role"] == "system"
    before = messages[0]["content"] if own else [_text(default_system)] if default_system else []
    content = [*before, _text("\n\n")] if before else []
    return [{"role": "system", "content": [*content, _text(described)]}, *messages[own:]]


def _with_tool_calls(messages: list[Message]) -> list[Message]:
    """Calls behind the text of their turn, the results that follow it as one turn of the user."""
    plain: list[Message] = []
    for before, message in zip([None, *messages], messages, strict=False):
        content = list(message["content"])
        if message["role"] == "tool":
            response = [_text("<tool_response>\n"), *content, _text("\n</tool_response>")]
            if before and before["role"] == "tool":
                plain[-1]["content"] += [_text("\n"), *response]
            else:
                plain.append({"role": "user", "content": response})
            continue
        if calls := message.get("tool_calls"):
            content.append(_text(("\n" if content else "") + written_calls(calls, "tool_call")))
        others = {name: value for name, value in message.items() if name != "tool_calls"}
        plain.append({**others, "content": content})
    return plain


def _with_functions(messages: list[Message]) -> list[Message]:
    """Calls, results and the answer behind each other in one turn of the assistant."""
    plain: list[Message] = []
    for number, message in enumerate(messages):
        after_result = number and messages[number - 1]["role"] == "tool"
        if message["role"] == "tool":
            if after_result:
                raise SampleError("parallel_calls", "several results of one call")
            plain[-1]["content"] += _untrained([_text(" "), *message["content"], _text("\n")])
            continue
        content = message["content"]
        if message["role"] == "assistant":
            content = _function_turn(message, after_result, messages[number + 1 :])
        if after_result:
            plain[-1]["content"] += content
        else:
            plain.append({"role": message["role"], "content": content})
    return plain


def _function_turn(message: Message, after_result: bool, following: list[Message]) -> list[dict[str, Any]]:
    calls, content = message.get("tool_calls") or [], list(message["content"])
    has_result = bool(following) and following[0]["role"] == "tool"
    if len(calls) > 1:
        raise SampleError("parallel_calls", f"{len(calls)} calls of one turn")
    if calls:
        content.append(_text(("\n" if content else "") + written_calls(calls, "function")))
    elif has_result:  # a call that could not be read
        content.append(_text(STOPS["function"]))
    elif after_result:
        content.insert(0, _text(f"{_RETURN} "))
    if not message.get("train", True):
        return _untrained(content)
    # Nobody is to learn that a turn ends before its result: what is last decides for the end of the turn.
    return [*content, *_untrained([_text("")])] if calls and not has_result else content


def _untrained(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**part, "train": False} if part["type"] in ("text", "box") else part for part in parts]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
