"""What a record of a conversation may look like, and the one normal form that everything after it knows.

LLaVA, MAmmoTH   {"image"?: path or list, "conversations": [{"from", "value"}]}, `<image>` where an image stands
Hugging Face     {"images"?: list, "messages": [{"role", "content": text or parts}]}, TRL's form
  │ read_conversation
  ▼
messages [{"role", "content": [{"type": "image"} | {"type": "text", "text"}]}], images in that order
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .sample_error import SampleError

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
OTHER_MEDIA = ("video", "videos", "audio", "audios")


class Conversation(NamedTuple):
    """The normal form.

    Attributes:
        messages (`list[dict]`): `role` (system, user or assistant) and `content`, a list of parts.
        images (`list`): what each image part stands for, as the record has it: a path, or a dict of `bytes` and
            `path`.
    """

    messages: list[dict[str, Any]]
    images: list[Any]


def read_conversation(record: Any) -> Conversation:
    """Turn a record into the normal form; no image and no text of it is left out in silence.

    A string marks its images by `<image>`. `messages` of strings without any mark have their images before the first
    user turn, as in TRL. Keys that this code does not know are left alone, but for those of other media.

    Args:
        record (`Any`): a parsed record of LLaVA's or of Hugging Face's form.

    Returns:
        [`Conversation`].

    Raises:
        SampleError: `not_an_object`, `no_conversation`, `bad_turn` (a turn without text or speaker),
            `unknown_role`, `unknown_content`, `unsupported_media`, `bad_encoding` (half a surrogate pair),
            `roles_out_of_order`, `no_assistant_turn`, `empty_answer`, `bad_image` (neither path nor bytes),
            `too_many_placeholders` or `too_few_placeholders`.
    """
    if not isinstance(record, Mapping):
        raise SampleError("not_an_object", f"the record is a {type(record).__name__}")
    media = next((name for name in OTHER_MEDIA if record.get(name)), None)
    if media:
        raise SampleError("unsupported_media", f"the record has {media}; only images can be read")
    turns = record.get("messages") or record.get("conversations")
    if not isinstance(turns, list | tuple) or not turns:
        raise SampleError("no_conversation", "the record has neither messages nor conversations")
    messages = [_read_turn(turn) for turn in turns]
    _check_roles([message["role"] for message in messages])
    listed = _listed_images(record)
    if record.get("messages") and listed:
        _place_as_trl(messages, turns, len(listed))
    images = _fill_images(messages, listed)
    for message in messages:
        message["content"] = join_texts(message["content"])
        if message["role"] == "assistant" and not any(part.get("text", "x").strip() for part in message["content"]):
            raise SampleError("empty_answer", "an answer without text")
    return Conversation(messages, images)


def join_texts(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Content without empty texts and with neighbouring texts as one.

    Args:
        parts (`Iterable[dict]`): parts of type image or text.

    Returns:
        `list[dict]`: a new list.
    """
    joined: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
        elif part["type"] != "text" or part["text"]:
            joined.append(part)
    return joined


def _read_turn(turn: Any) -> dict[str, Any]:
    """One turn with a list of parts; an image that the record lists elsewhere is None here."""
    if not isinstance(turn, Mapping):
        raise SampleError("bad_turn", f"a turn is a {type(turn).__name__}")
    speaker, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if turn.get("tool_calls"):
        raise SampleError("unknown_content", "a turn calls tools")
    if not isinstance(speaker, str) or not isinstance(content, str | list | tuple):
        raise SampleError("bad_turn", f"a turn has the keys {', '.join(map(str, turn))}")
    if speaker not in ROLES:
        raise SampleError("unknown_role", f"a turn of {speaker!r}")
    if not isinstance(content, str):
        return {"role": ROLES[speaker], "content": [_read_part(part) for part in content]}
    first, *others = map(_text, content.split(PLACEHOLDER))
    parts = [first, *(part for text in others for part in (_image(None), text))]
    return {"role": ROLES[speaker], "content": parts}


def _read_part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _text(part["text"])
    if kind == "image":
        return _image(part.get("image") or part.get("path"))
    raise SampleError("unknown_content", f"content of type {kind!r}; image and text can be read")


def _text(text: str) -> dict[str, Any]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError("bad_encoding", f"a text is no Unicode: {error}") from error
    return {"type": "text", "text": text}


def _image(image: Any) -> dict[str, Any]:
    return {"type": "image", "image": image}


def _check_roles(roles: list[str]) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2):
        raise SampleError("roles_out_of_order", f"turns of {', '.join(roles)}")
    if "assistant" not in turns:
        raise SampleError("no_assistant_turn", "nobody answers")


def _listed_images(record: Mapping) -> list[Any]:
    found = record.get("images") or record.get("image") or []
    return list(found) if isinstance(found, list | tuple) else [found]


def _place_as_trl(messages: list[dict[str, Any]], turns: Iterable[Mapping], images: int) -> None:
    """Put the images before the first user turn's text, if all content is text that says nothing of their places."""
    marked = any(part["type"] == "image" for message in messages for part in message["content"])
    if not marked and all(isinstance(turn.get("content"), str) for turn in turns):
        first = next(message for message in messages if message["role"] == "user")
        first["content"][:0] = [_image(None) for _ in range(images)]


def _fill_images(messages: list[dict[str, Any]], listed: list[Any]) -> list[Any]:
    """All images in the order of the text; the parts keep none."""
    own = [part.pop("image") for message in messages for part in message["content"] if part["type"] == "image"]
    wanted = own.count(None)
    if wanted != len(listed):
        reason = "too_many_placeholders" if wanted > len(listed) else "too_few_placeholders"
        raise SampleError(reason, f"{wanted} placeholders and {len(listed)} images")
    rest = iter(listed)
    images = [next(rest) if image is None else image for image in own]
    if not all(_is_image(image) for image in images):
        raise SampleError("bad_image", "an image is neither a path nor bytes")
    return images


def _is_image(image: Any) -> bool:
    if isinstance(image, Mapping):
        return isinstance(image.get("bytes"), bytes) or _is_image(image.get("path"))
    return isinstance(image, str) and bool(image)
