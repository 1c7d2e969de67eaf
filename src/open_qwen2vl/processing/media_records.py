"""The images and videos of a record: where its conversation has them, and what stands for each.

"image" or "images", "video" or "videos" beside the turns       marked `<image>` and `<video>` in the text, or by parts
{"type": "image", "image": path}, {"type": "video", "video": path}      parts with their own
"""

import base64
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .sample_error import SampleError

MARK = re.compile("<(image|video)>")  # in the text of a turn
OTHER_MEDIA = ("audio", "audios")
# Of a part of type video: what would show another part of it.
_VIDEO_OPTIONS = (
    *("fps", "video_fps", "sample_fps", "nframes", "num_frames", "min_frames", "max_frames"),
    *("video_start", "video_end", "start_time", "end_time", "start", "end"),
)
_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class Video(NamedTuple):
    """A video of a record, among its images."""

    file: Any  # what stands for it, as for an image: a path, or a dict of `bytes` and `path`


def media_part(kind: str, file: Any) -> dict[str, Any]:
    """A part of content; None for what the record lists elsewhere."""
    return {"type": kind, kind: file}


def read_media_part(part: Mapping) -> dict[str, Any]:
    """A part of type `image`, `image_url`, `video` or `video_url`."""
    kind = part["type"].removesuffix("_url")
    if part.get("text"):
        raise SampleError("unknown_content", f"a part of type {part['type']} has a text as well")
    if kind == "video" and (own := next((name for name in _VIDEO_OPTIONS if part.get(name) is not None), None)):
        raise SampleError("unknown_content", f"a video has {own}, which is not read: pack has options for all videos")
    if part["type"] == kind:
        return media_part(kind, first_of(part, kind, "path", "url"))
    url = part.get(part["type"])
    return media_part(kind, url.get("url") if isinstance(url, Mapping) else url)


def take_media(messages: list[dict[str, Any]], turns: Iterable[Mapping], record: Mapping) -> list[Any]:
    """All images, and videos as [`Video`], in the order of the text; the parts of the messages keep none."""
    listed = {kind: _listed(record, kind) for kind in ("image", "video")}
    parts = [part for message in messages for part in message["content"] if part["type"] in listed]
    if listed["video"] and not listed["image"] and not any(part["type"] == "video" for part in parts):
        # LLaVA-Video marks its videos by <image>.
        for part in parts:
            if part["image"] is None:
                part |= {"type": "video", "video": part.pop("image")}
    if record.get("messages") and not parts and all(isinstance(turn.get("content"), str) for turn in turns):
        # As TRL does where all content is text that says nothing of their places.
        first = next(message for message in messages if message["role"] == "user")
        parts = [media_part(kind, None) for kind, files in listed.items() for _ in files]
        first["content"][:0] = parts
    own = [(part["type"], part.pop(part["type"])) for part in parts]
    own = [(kind, None if _is_nothing(file) else file) for kind, file in own]
    for kind, files in listed.items():
        wanted = own.count((kind, None))
        if wanted != len(files):
            reason = "too_many_placeholders" if wanted > len(files) else "too_few_placeholders"
            raise SampleError(reason, f"{wanted} placeholders and {len(files)} {kind}s")
    rest = {kind: iter(files) for kind, files in listed.items()}
    return [_reference(kind, next(rest[kind]) if file is None else file) for kind, file in own]


def first_of(part: Mapping, *names: str) -> Any:
    """The first of these values that is there."""
    return next((part[name] for name in names if part.get(name) is not None), None)


def image_path(image: Any) -> Any:
    """What names an image: a path, or an address under one of the keys that data sets have for it."""
    if not isinstance(image, Mapping):
        return image
    url = first_of(image, "path", "url", "image_url", "raw_url")
    return url.get("url") if isinstance(url, Mapping) else url


def refuse_url(path: str, kind: str = "image") -> None:
    """Raise `image_is_url` or `video_is_url` for an address."""
    if _ADDRESS.match(path):
        raise SampleError(f"{kind}_is_url", f"{path} has to be downloaded first")


def _listed(record: Mapping, kind: str) -> list[Any]:
    """The record's images or videos; what has neither bytes nor a path stands for none."""
    found = []
    for name in (f"{kind}s", kind):
        files = record.get(name)
        files = files if isinstance(files, list | tuple) else [files]
        if own := [file for file in files if not _is_nothing(file)]:
            found.append(own)
    if len(found) > 1 and found[0] != found[1]:
        raise SampleError(f"ambiguous_{kind}s", f"{len(found[1])} in {kind} and {len(found[0])} others in {kind}s")
    if not found and (record.get(f"{kind}_url") or record.get(f"{kind}_urls")):
        raise SampleError(f"{kind}_is_url", f"{kind}_url of the record has to be downloaded first")
    return found[0] if found else []


def _is_nothing(file: Any) -> bool:
    if isinstance(file, Mapping):
        return all(value is None for value in file.values())
    return file is None or file == ""


def _reference(kind: str, file: Any) -> Any:
    """A path, or a dict with bytes or a path; what a data URI holds becomes bytes. Of a video in a [`Video`]."""
    if kind == "video":
        return Video(_file(kind, file))
    return _file(kind, file)


def _file(kind: str, file: Any) -> Any:
    if isinstance(file, Mapping) and isinstance(file.get("bytes"), bytes):
        return file
    path = image_path(file)
    if not isinstance(path, str) or not path:
        article = "an" if kind == "image" else "a"
        raise SampleError(f"bad_{kind}", f"{article} {kind} is neither a path nor bytes")
    refuse_url(path, kind)
    if path.startswith("data:"):
        try:
            return {"bytes": base64.b64decode(path.partition(",")[2], validate=True), "path": None}
        except ValueError as error:
            raise SampleError(f"corrupt_{kind}", f"a data URI is no base64: {error}") from error
    return file if isinstance(file, Mapping) and file.get("path") else path
