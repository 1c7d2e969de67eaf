"""What a record of a conversation may look like, and the one normal form that everything after it knows.

LLaVA, MAmmoTH   {"image"?: path or list, "conversations": [{"from", "value"}]}, `<image>` where an image stands
Hugging Face     {"images"?: list, "messages": [{"role", "content": text or parts}]}, TRL's form
                 and videos beside the images or in their place (media_records.py)
branches         "branches": [turns, ...] in place of the turns: as many conversations on the record's images
  │ read_conversation
  ▼
messages [{"role", "content": [{"type": "image"} | {"type": "text", "text"}], "train"?: False, "tool_calls"?}],
images and videos in that order, boxes between them, as box_parts.py has them, and tools (tool_records.py)
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from .box_parts import place_boxes, read_box
from .media_records import MARK, OTHER_MEDIA, media_part, read_media_part, take_media
from .sample_error import SampleError
from .text_formats import has_words
from .tool_records import order_results, read_calls, read_tools

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
_ORDER = re.compile("s?(ua(t+a)*)*(u|ua(t+a)*t+)?")  # of turns by their first letters: results follow an answer
TURNS = ("messages", "conversations")
BRANCHES = "branches"
SYSTEM = ("system", "system_prompt", "system_message")  # beside the turns
# Of a turn, or a list of them beside the turns: 0 is not learned.
FLAGS = ("loss", "weight", "train", "loss_mask", "trainable", "train_on_turn")
# Texts that no template here shows.
UNREAD = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "functions")
BYTE_ORDER_MARK = "\ufeff"
MAX_TEXT = 1 << 20  # characters of a record, some 250,000 tokens


class Conversation(NamedTuple):
    """The normal form."""

    # `role` (system, user, assistant or tool), `content`, a list of parts, and of answers `train`, False where it is
    # not to be learned, and `tool_calls`, `[{"name", "arguments": JSON text}]`
    messages: list[dict[str, Any]]
    # what each image part stands for, as the record has it: a path, or a dict of `bytes` and `path`; or a [`Video`]
    images: list[Any]
    tools: list[dict[str, Any]]  # what may be called, as the record has it


def read_conversation(record: Any) -> Conversation:
    """Turn a record into the normal form; no image and no text of it is left out in silence.

    A string marks its images by `<image>` and its videos by `<video>`, or by `<image>` where it has nothing else.
    `messages` of strings without any mark have them before the first user turn, as in TRL. An answer that is not to be
    learned (`FLAGS`, in its turn or as a list of the record) has `"train": False`. Keys that this code does not know
    are left alone.

    Args:
        record (`Any`): a parsed record of LLaVA's or of Hugging Face's form.

    Returns:
        [`Conversation`].

    Raises:
        SampleError: `not_an_object`, `no_conversation`, `bad_branches` (in place of turns, and never split),
            `ambiguous_conversation` (`messages` that are not its `conversations`, or two system prompts), `bad_turn`
            (a turn without text or speaker), `bad_text`,
            `unknown_role`, `unknown_content`, `unread_text` (reasoning), `bad_tools`, `bad_tool_calls`,
            `bad_tool_results` (of calls that were not made), `unsupported_media`,
            `unsupported_weight` (neither 0 nor 1), `bad_encoding` (half a surrogate pair), `roles_out_of_order`,
            `no_assistant_turn`, `no_trained_turn`, `empty_answer`, `bad_image` (neither path nor bytes),
            `image_is_url`, `ambiguous_images` (`image` and `images`), the same of videos, `too_many_placeholders`,
            `too_few_placeholders`, `bad_box`, `empty_box` or `box_without_image`.
    """
    if not isinstance(record, Mapping):
        raise SampleError("not_an_object", f"the record is a {type(record).__name__}")
    media = next((name for name in OTHER_MEDIA if record.get(name)), None)
    if media:
        raise SampleError("unsupported_media", f"the record has {media}; only images and videos can be read")
    _refuse_unread(record, "the record")
    turns = _turns(record)
    messages = [_read_turn(turn) for turn in turns]
    _set_aside(messages, turns, record)
    _add_system(messages, record)
    _check_roles([message["role"] for message in messages])
    images = order_results(messages, take_media(messages, turns, record))
    place_boxes(messages)
    tools = read_tools(record.get("tools"))
    refuse_long(_texts(messages, tools))
    for message in messages:
        message["content"] = join_texts(message["content"])
        says = any(has_words(part.get("text", "x")) for part in message["content"])
        if message["role"] == "assistant" and not says and "tool_calls" not in message:
            raise SampleError("empty_answer", "an answer without text")
    return Conversation(messages, images, tools)


def split_branches(record: Any) -> list[Any] | None:
    """The records of one conversation each that the `branches` of a record stand for; None where it has none.

    Raises `bad_branches` for what is no list of lists of turns, and `ambiguous_conversation` beside turns.
    """
    branches = record.get(BRANCHES) if isinstance(record, Mapping) else None
    if not isinstance(branches, list | tuple) or not branches:
        return None
    if any(record.get(name) for name in TURNS):
        raise SampleError("ambiguous_conversation", f"{BRANCHES} beside other turns")
    if not all(isinstance(turns, list | tuple) for turns in branches):
        raise SampleError("bad_branches", f"{BRANCHES} is no list of lists of turns")
    rest = {name: value for name, value in record.items() if name not in (BRANCHES, *TURNS)}
    # Whether images may stand unmarked depends on the form.
    are_messages = [any(isinstance(turn, Mapping) and "role" in turn for turn in turns) for turns in branches]
    return [{**rest, TURNS[not own]: turns} for own, turns in zip(are_messages, branches, strict=True)]


def join_texts(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Content without empty texts and with neighbouring texts as one, apart from those that are not learned."""
    joined: list[dict[str, Any]] = []
    for part in parts:
        before = joined[-1] if joined else {"type": None}
        if part["type"] == before["type"] == "text" and part.get("train", True) == before.get("train", True):
            joined[-1] = {**before, "text": before["text"] + part["text"]}
        elif part["type"] != "text" or part["text"] or "train" in part:
            joined.append(part)
    return joined


def _turns(record: Mapping) -> list[Any]:
    found = {name: record[name] for name in TURNS if record.get(name) is not None}
    if not any(found.values()) and record.get(BRANCHES) is not None:
        raise SampleError("bad_branches", f"{BRANCHES} {_what_is_wrong(record[BRANCHES])}")
    if not found:
        raise SampleError("no_conversation", f"the record has neither {' nor '.join(TURNS)}")
    for name, turns in found.items():
        if not isinstance(turns, list | tuple):
            raise SampleError("no_conversation", f"{name} is a {type(turns).__name__}, no list of turns")
    filled = [turns for turns in found.values() if turns]
    if not filled:
        raise SampleError("no_conversation", f"{' and '.join(found)} without a turn")
    if len(filled) > 1 and len({repr(list(map(_read_turn, turns))) for turns in filled}) > 1:
        raise SampleError("ambiguous_conversation", f"{' and '.join(found)} are not the same")
    return list(filled[0])


def _what_is_wrong(branches: Any) -> str:
    """With branches that are left when [`split_branches`] has seen the record, or that it was not asked for."""
    if not isinstance(branches, list | tuple):
        return f"is a {type(branches).__name__}, no list of lists of turns"
    return "are read into packs alone" if branches else "without a turn"


def _read_turn(turn: Any) -> dict[str, Any]:
    """One turn with a list of parts; an image that the record lists elsewhere is None here."""
    if not isinstance(turn, Mapping):
        raise SampleError("bad_turn", f"a turn is a {type(turn).__name__}")
    if turn.get("function_call"):
        raise SampleError("unknown_content", "a turn calls tools by function_call, not by tool_calls")
    _refuse_unread(turn, "a turn")
    speaker, content = (_only(turn, *names) for names in (("role", "from"), ("content", "value")))
    if not isinstance(speaker, str):
        raise SampleError("bad_turn", f"a turn with the keys {', '.join(map(str, turn))} does not say who speaks")
    if speaker not in ROLES:
        raise SampleError("unknown_role", f"a turn of {speaker!r}; known are {', '.join(ROLES)}")
    calls = read_calls(turn.get("tool_calls"))
    if calls and ROLES[speaker] != "assistant":
        raise SampleError("bad_tool_calls", f"a turn of {speaker} has tool_calls")
    called: dict[str, Any] = {"tool_calls": calls} if calls else {}
    if ROLES[speaker] == "tool" and turn.get("tool_call_id"):
        called["tool_call_id"] = str(turn["tool_call_id"])
    content = "" if calls and content is None else content
    if not isinstance(content, str | list | tuple):
        raise SampleError("bad_turn", f"what {speaker} says is a {type(content).__name__}")
    if not isinstance(content, str):
        return {"role": ROLES[speaker], "content": [_read_part(part) for part in content], **called}
    # Texts, and between them what is marked.
    pieces = MARK.split(content)
    parts = [media_part(piece, None) if number % 2 else _text(piece) for number, piece in enumerate(pieces)]
    return {"role": ROLES[speaker], "content": parts, **called}


def _only(turn: Mapping, *names: str) -> Any:
    found = [turn[name] for name in names if turn.get(name) is not None]
    if len(found) > 1 and found[0] != found[1] and ROLES.get(str(found[0]), 0) != ROLES.get(str(found[1]), 1):
        raise SampleError("ambiguous_conversation", f"{' and '.join(names)} of a turn are not the same")
    return found[0] if found else None


def _refuse_unread(part: Mapping, where: str) -> None:
    unread = next((name for name in UNREAD if part.get(name)), None)
    if unread:
        raise SampleError("unread_text", f"{where} has {unread}, which is not trained on")


def _read_part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise SampleError("bad_text", f"a part of type text has a {type(part.get('text')).__name__} for it")
        return _text(part["text"])
    if kind in ("image", "image_url", "video", "video_url"):
        return read_media_part(part)
    if kind == "box":
        box = read_box(part)
        return {**box, "label": box["label"] and _text(box["label"])["text"]}
    raise SampleError("unknown_content", f"content of type {kind!r}; image, video, text and box can be read")


def _set_aside(messages: list[dict[str, Any]], turns: list[Any], record: Mapping) -> None:
    """Mark the answers that are not to be learned, as their turns or a list of the record say."""
    answers = [message for message in messages if message["role"] == "assistant"]
    for message, turn in zip(messages, turns, strict=True):
        if not all([_is_trained(turn.get(name), name) for name in FLAGS]):
            message["train"] = False
    for name in FLAGS:
        flags = record.get(name)
        if not isinstance(flags, list | tuple):
            if not _is_trained(flags, name):
                raise SampleError("no_trained_turn", f"{name} of the record is {flags!r}")
            continue
        if len(flags) not in (len(messages), len(answers)):
            raise SampleError("unsupported_weight", f"{len(flags)} values of {name} for {len(messages)} turns")
        for message, flag in zip(messages if len(flags) == len(messages) else answers, flags, strict=True):
            if not _is_trained(flag, name):
                message["train"] = False
    for message in messages:
        if message["role"] != "assistant":
            message.pop("train", None)  # nobody learns these anyway
    if answers and all("train" in answer for answer in answers):
        raise SampleError("no_trained_turn", "no answer is to be learned")


def _is_trained(flag: Any, name: str) -> bool:
    if flag is None or isinstance(flag, int | float) and flag in (0, 1):
        return flag is None or bool(flag)
    raise SampleError("unsupported_weight", f"{name} is {flag!r}; 0 and 1 are known")


def _add_system(messages: list[dict[str, Any]], record: Mapping) -> None:
    """Put a system prompt that stands beside the turns before them."""
    for name in SYSTEM:
        prompt = record.get(name)
        if not prompt:
            continue
        if not isinstance(prompt, str):
            raise SampleError("bad_turn", f"{name} is a {type(prompt).__name__}")
        system = {"role": "system", "content": [_text(prompt)]}
        if messages[0]["role"] != "system":
            messages.insert(0, system)
        elif join_texts(messages[0]["content"]) != system["content"]:
            raise SampleError("ambiguous_conversation", f"{name} beside another system prompt")


def _text(text: str) -> dict[str, Any]:
    text = text.lstrip(BYTE_ORDER_MARK)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError("bad_encoding", f"a text is no Unicode: {error}") from error
    return {"type": "text", "text": text}


def _check_roles(roles: list[str]) -> None:
    if not _ORDER.fullmatch("".join(role[0] for role in roles)):
        raise SampleError("roles_out_of_order", f"turns of {', '.join(roles)}")
    if "assistant" not in roles:
        raise SampleError("no_assistant_turn", "nobody answers")


def _texts(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Iterator[str | None]:
    for message in messages:
        yield from (part.get(name) for part in message["content"] for name in ("text", "label"))
        yield from (call["arguments"] for call in message.get("tool_calls", ()))
    yield from map(repr, tools)


def refuse_long(texts: Iterable[str | None]) -> None:
    """Raise `text_too_large` for texts that would take seconds and gigabytes to be found too long."""
    length = sum(len(text) for text in texts if text)
    if length > MAX_TEXT:
        raise SampleError("text_too_large", f"texts of {length:,} characters, more than {MAX_TEXT:,}")
