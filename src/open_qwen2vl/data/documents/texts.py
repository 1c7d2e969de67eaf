"""What a document of texts and images may look like in a file, and the one normal form that is planned and read.

caption        {"image": path or {"bytes", "path"}, or a path in `path` and the like, "caption" or "text": text}, or
               "video" for the image
text           {"text": text}
OBELICS        {"texts": [text or null], "images": [null, path or {"bytes", "path"}]}, one of the two at each index
the original   {"texts": [text or null], "image_info": [null or {"image_base64"}]}, likewise
MMC4           {"text_list": [sentence], "image_info": [{"image_name" or "image_base64", "matched_text_index"}]}
  │ read_caption, read_interleaved
  ▼
texts [text, or None where an image stands], images in that order
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...processing.conversation_records import BYTE_ORDER_MARK, refuse_long
from ...processing.media_records import Video, image_path, refuse_url
from ...processing.sample_error import SampleError
from ...processing.text_formats import has_words
from ..storage.tars import VIDEO_EXTENSIONS

IMAGE_FIELD, VIDEO_FIELD = "image", "video"
# Other names of a path beside a caption; `path` beside a plain text may be that of the text.
PATH_FIELDS = ("image_path", "img_path", "file_name", "filename", "file_path", "filepath", "path", "img")
CAPTION_FIELDS = ("caption", "text")  # where none is named, the first that a record or a table has


class Texts(NamedTuple):
    """The normal form."""

    texts: list[str | None]  # in reading order, None where an image stands
    images: list[
        Any
    ]  # what stands there: a path, or a dict of `bytes`, `image_base64` or `path`; of a video [`Video`]


def caption_field(names: Any, wanted: str | None = None) -> str | None:
    """Which field of a record, or column of a table, is a caption or a text; None for other forms."""
    return next((name for name in ((wanted,) if wanted else CAPTION_FIELDS) if name in names), None)


def image_field(names: Any, is_caption: bool) -> str | None:
    """Which field of a record, or column of a table, is the video or image of a caption; that of a text has no other
    name.
    """
    known = (VIDEO_FIELD, IMAGE_FIELD, *(PATH_FIELDS if is_caption else ()))
    return next((name for name in known if name in names), None)


def read_caption(
    record: Any, field: str, needs_image: bool, is_caption: bool = True, videos: tuple[str, ...] = VIDEO_EXTENSIONS
) -> Texts:
    """A caption, or a text where there is no image and none is needed, in the normal form.

    What `video` names is a video, and a path that ends in one of `videos`. Raises `missing_caption`, `bad_caption`,
    `empty_caption`, `bad_encoding`, `ambiguous_media`, `missing_image`, `bad_image` or `bad_video`.
    """
    if not isinstance(record, Mapping):
        raise SampleError("not_an_object", f"the record is a {type(record).__name__}")
    caption = record.get(field)
    if caption is None:
        raise SampleError("missing_caption", f"{field} is null")
    if not isinstance(caption, str):
        raise SampleError("bad_caption", f"{field} is a {type(caption).__name__}")
    _check_text(caption)
    refuse_long([caption])
    caption = caption.lstrip(BYTE_ORDER_MARK)
    if not has_words(caption):
        raise SampleError("empty_caption", "the caption is empty")
    video = _reference(record.get(VIDEO_FIELD), "video")
    image = record.get(image_field([name for name in record if name != VIDEO_FIELD], is_caption))
    reference = _reference(image)
    if video is not None and reference is not None:
        raise SampleError("ambiguous_media", "it has both an image and a video, and its caption is of one of them")
    if video is not None:
        return Texts([None, caption], [Video(video)])
    if reference is not None:
        path = reference.get("path") if isinstance(reference, Mapping) else reference
        is_video = isinstance(path, str) and path.rpartition(".")[2].lower() in videos
        return Texts([None, caption], [Video(reference) if is_video else reference])
    if needs_image:
        is_null = isinstance(image, Mapping) and all(value is None for value in image.values())
        reason = "missing_image" if is_null or not image else "bad_image"
        raise SampleError(reason, "neither the bytes of an image nor a path")
    return Texts([caption], [])


def decode_caption(data: bytes) -> str:
    """The caption in a text file, without a byte-order mark; `bad_caption_encoding`, or `empty_caption`."""
    try:
        caption = data.decode().lstrip(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise SampleError("bad_caption_encoding", str(error)) from error
    if not has_words(caption):
        raise SampleError("empty_caption", "the caption is empty")
    return caption


def is_interleaved(names: Any) -> bool:
    """Whether a parsed record, or a list of column names, has the lists of texts and of images."""
    if not isinstance(names, Mapping | list) or "messages" in names or "conversations" in names:
        return False
    return ("texts" in names and ("images" in names or "image_info" in names)) or (
        "text_list" in names and "image_info" in names
    )


def read_interleaved(record: Any) -> Texts:
    """A document of texts and images in the normal form.

    An image of MMC4 stands before the sentence that it matches; the sentences between two images make one text. Raises
    `not_an_object`, `no_document` (none of the forms), `unequal_lists`, `empty_entry` (neither text nor image),
    `ambiguous_entry` (both), `bad_text`, `bad_encoding` (half a surrogate pair), `bad_image` (no path, no bytes),
    `bad_text_index`.
    """
    if not isinstance(record, Mapping):
        raise SampleError("not_an_object", f"the record is a {type(record).__name__}")
    if not is_interleaved(record):
        raise SampleError("no_document", f"the record has the keys {', '.join(map(str, record))}")
    is_mmc4 = "text_list" in record
    texts = record["text_list" if is_mmc4 else "texts"]
    images = record.get("images") if record.get("image_info") is None else record["image_info"]
    if not isinstance(texts, list) or not isinstance(images, list):
        raise SampleError("no_document", "its texts or its images are no list")
    for text in texts:
        _check_text(text)
    refuse_long(texts)
    return _read_mmc4(texts, images) if is_mmc4 else _read_parallel(texts, images)


def image_bytes(reference: Any) -> bytes | None:
    """The file of an image or video in the record itself; None for a path; `corrupt_image` if it is no base64."""
    reference = reference.file if isinstance(reference, Video) else reference
    if not isinstance(reference, Mapping):
        return None
    if "image_base64" not in reference:
        return reference.get("bytes")
    try:
        return base64.b64decode(reference["image_base64"])
    except (binascii.Error, ValueError) as error:
        raise SampleError("corrupt_image", f"an image is no base64: {error}") from error


def _read_parallel(texts: list[Any], entries: list[Any]) -> Texts:
    if len(texts) != len(entries):
        raise SampleError("unequal_lists", f"{len(texts)} texts and {len(entries)} images")
    order: list[str | None] = []
    images = []
    for number, (text, entry) in enumerate(zip(texts, entries, strict=True)):
        image = _reference(entry)
        if bool(text) == (image is not None):
            reason, what = ("ambiguous_entry", "both") if text else ("empty_entry", "neither")
            raise SampleError(reason, f"entry {number} is {what} text and image")
        order.append(text.lstrip(BYTE_ORDER_MARK) if text else None)
        images += [] if image is None else [image]
    return Texts(order, images)


def _read_mmc4(sentences: list[Any], entries: list[Any]) -> Texts:
    before: list[list[Any]] = [[] for _ in sentences]
    for entry in entries:
        image = _reference(entry)
        if image is None:
            raise SampleError("bad_image", "an image has neither a name nor its content")
        index = entry.get("matched_text_index") if isinstance(entry, Mapping) else None
        # True is an int, too, and would be the second sentence.
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(sentences):
            raise SampleError("bad_text_index", f"an image is matched to sentence {index!r} of {len(sentences)}")
        before[index].append(image)
    order: list[str | None] = []
    for sentence, images in zip(sentences, before, strict=True):
        order += [None] * len(images)
        if not sentence:
            continue
        if order and order[-1] is not None:
            order[-1] = f"{order[-1]} {sentence}"
        else:
            order.append(sentence)
    return Texts(order, [image for images in before for image in images])


def _check_text(text: Any) -> None:
    if text is None:
        return
    if not isinstance(text, str):
        raise SampleError("bad_text", f"a text is a {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError("bad_encoding", f"a text is no Unicode: {error}") from error


def _reference(entry: Any, kind: str = "image") -> Any:
    """What stands for an image; None where there is none (the original writes `{}` for a failed download)."""
    if entry is None or entry == "":
        return None
    if isinstance(entry, str):
        refuse_url(entry, kind)
        return entry
    if not isinstance(entry, Mapping):
        raise SampleError(f"bad_{kind}", f"the {kind} is a {type(entry).__name__}")
    if isinstance(entry.get("image_base64"), str) and entry["image_base64"]:
        return {"image_base64": entry["image_base64"]}
    if isinstance(entry.get("bytes"), bytes):
        return {"bytes": entry["bytes"], "path": entry.get("path")}
    path = entry.get("path") or entry.get("image_name") or image_path(entry)
    if isinstance(path, str):
        refuse_url(path, kind)
    return path if isinstance(path, str) and path else None
