"""The two forms that records have, each with what the planner and the reader ask of it.

    texts with images   captions, texts alone, interleaved documents ── texts.py ──────────────► pieces that fit a pack
    conversation        LLaVA's, Hugging Face's, FineVision's rows ── conversation_records.py ─► one document

`parse` turns a record into its content and the references of its images; `write` puts boxes into the family's words;
`measure` gives the lengths of many contents, tokenised at once; `document` lays one of them out.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...families.boxes import write_boxes
from ...families.interface import DocumentProcessor, Media
from ...processing.conversation_records import BRANCHES, FLAGS, UNREAD, read_conversation, split_branches
from ...processing.conversations import ConversationFormat
from ...processing.sample_error import SampleError
from ...processing.text_formats import (
    MAX_INTERLEAVED_IMAGES,
    count_as_text,
    split_document,
    text_document,
    text_parts,
)
from ...processing.tool_forms import TOOL_FORMS, ToolForm
from ..storage.tables import CONVERSATION_COLUMNS, Columns
from ..storage.tars import ANIMATIONS, VIDEO_EXTENSIONS
from .records import MAX_DOCUMENT_BYTES
from .texts import CAPTION_FIELDS, IMAGE_FIELD, PATH_FIELDS, VIDEO_FIELD, Texts, read_caption, read_interleaved

RULES = ("standard", "original")
TURNS = "texts"  # the field of FineVision's and Cauldron's rows
IMAGE_ID = "image_id"  # the field that names the picture of a conversation, for sharing it


class Prefix(NamedTuple):
    """A conversation up to the end of its first image or video; equal ones have the same ids but for the picture."""

    texts: tuple[str, ...]  # before the picture
    tokens: int
    is_learned: bool  # whether an answer is in it or follows at once


class Piece(NamedTuple):
    """A document that a record becomes, by its first entry and their number; both None for a whole conversation."""

    first: int | None
    count: int | None
    tokens: int
    labels: int
    prefix: Prefix | None = None  # of a conversation that may share its picture


class Form(Protocol):
    """One form of records, for one plan."""

    columns: Columns
    max_bytes: int | None
    keeps_uid: bool

    def split(self, record: Any) -> list[Any] | None:
        """What a record holds that is to be parsed one by one; None for a record that is one content itself."""

    def parse(self, record: Any) -> tuple[Any, list[Any]]:
        """Content, and the references of its images in reading order; a [`SampleError`] for what is none."""

    def write(self, content: Any, media: Sequence[Media]) -> Any:
        """The content with what depends on the sizes of its media; a [`SampleError`] as [`write_boxes`] raises it."""

    def measure(self, contents: Sequence[Any], blocks: Sequence[Sequence[int]]) -> Iterator[list[Piece] | SampleError]:
        """The documents that each content becomes, given the lengths of its images' blocks."""

    def document(
        self, content: Any, entries: dict[str, int] | None, blocks: list[list[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Int64 ids and labels `(S,)` of a document."""


def make_form(settings: dict[str, Any], documents: DocumentProcessor) -> Form:
    """The form of a plan, or of a part of it, by its `text_format`."""
    return (ConversationForm if settings["text_format"] == "conversation" else TextsForm)(settings, documents)


def columns_of(settings: dict[str, Any]) -> Columns:
    """The columns of tables that a form reads."""
    if settings["text_format"] == "conversation":
        return Columns((*CONVERSATION_COLUMNS.texts, TURNS, BRANCHES, IMAGE_ID), CONVERSATION_COLUMNS.images)
    if settings["text_format"] == "interleaved":
        return Columns(("texts", "id", "uid"), ("images",))
    images = (VIDEO_FIELD, IMAGE_FIELD, *(PATH_FIELDS if settings["text_format"] == "caption" else ()))
    return Columns((settings["caption_column"] or CAPTION_FIELDS[0], "id", "uid"), images)


def video_extensions(settings: dict[str, Any]) -> tuple[str, ...]:
    """What a plan takes for the videos of captions by their names."""
    return (*VIDEO_EXTENSIONS, *(ANIMATIONS if settings.get("animations") else ()))


class TextsForm:
    """Texts with images between them, or without any."""

    keeps_uid = True

    def __init__(self, settings: dict[str, Any], documents: DocumentProcessor):
        self._settings, self._tokenizer, self._format = settings, documents.tokenizer, documents.text_format
        self._is_interleaved = settings["text_format"] == "interleaved"
        self._is_caption = settings["text_format"] == "caption"
        self.needs_image = self._is_caption and not settings.get("text_only")
        self.columns = columns_of(settings)
        self.max_bytes = MAX_DOCUMENT_BYTES if self._is_interleaved else None

    def split(self, record: Any) -> None:
        """See [`Form`]; nothing."""

    def parse(self, record: Any) -> tuple[list[str | None], list[Any]]:
        """Texts with None where an image stands, and the images' references."""
        if isinstance(record, Texts):
            return record
        if not self._is_interleaved:
            column, videos = self._settings["caption_column"], video_extensions(self._settings)
            return read_caption(record, column, self.needs_image, self._is_caption, videos)
        texts, images = read_interleaved(record)
        if self._settings["rules"] == "original":
            if not images:
                raise SampleError("no_image", "a document without an image")
            if len(images) > MAX_INTERLEAVED_IMAGES:
                raise SampleError("too_many_images", f"more than {MAX_INTERLEAVED_IMAGES} images")
        return Texts(texts, images)

    def write(self, content: list[str | None], media: Sequence[Media]) -> list[str | None]:
        """See [`Form`]; nothing does."""
        return content

    def measure(
        self, contents: Sequence[list[str | None]], blocks: Sequence[Sequence[int]]
    ) -> Iterator[list[Piece] | SampleError]:
        """See [`Form`]."""
        parts = [text_parts(texts, self._format) for texts in contents]
        # Entries without a text of their own are not sent to the tokenizer: half of a caption's.
        counts = iter(count_as_text(self._tokenizer, [part for own in parts for part in own if part]))
        for texts, own, lengths in zip(contents, parts, blocks, strict=True):
            yield self._split(texts, [next(counts) if part else 0 for part in own], lengths)

    def _split(self, texts: list[str | None], lengths: list[int], blocks: Sequence[int]) -> list[Piece]:
        max_length, most = self._settings["max_length"], MAX_INTERLEAVED_IMAGES
        if self._is_interleaved and self._settings["rules"] == "original":
            # The original cuts nothing: what is too long is left out whole.
            max_length = sys.maxsize
        elif self._is_interleaved:
            most = min(most, self._settings["max_images"] or most)
        pieces, before = [], 0
        for first, stop, tokens in split_document(texts, lengths, list(blocks), self._format, max_length, most):
            after = before + texts[first:stop].count(None)
            starts_with_media = not self._format.document_start and texts[first] is None
            # Nothing comes before the first token to tell it from; where that is an image, it has no label anyway.
            labels = tokens - sum(blocks[before:after]) - (not starts_with_media)
            pieces.append(Piece(first, stop - first, tokens, labels))
            before = after
        return pieces

    def document(
        self, content: list[str | None], entries: dict[str, int] | None, blocks: list[list[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """See [`Form`]."""
        texts = content[entries["first"] : entries["first"] + entries["count"]]
        return text_document(texts, blocks, self._tokenizer, self._format)


class ConversationForm:
    """Conversations through the chat template."""

    keeps_uid = False  # several conversations are about one image
    max_bytes = None
    needs_image = False

    def __init__(self, settings: dict[str, Any], documents: DocumentProcessor):
        self._chat = conversation_format(documents, settings.get("tool_form", TOOL_FORMS[0]))
        self._boxes, self._shares = documents.boxes, settings.get("share_images", False)
        self.columns = columns_of(settings)

    def split(self, record: Any) -> list[Any] | None:
        """See [`Form`]; its branches."""
        return split_branches(record)

    def parse(self, record: Any) -> tuple[list[dict[str, Any]], list[Any]]:
        """Messages in the normal form with calls of tools as text, and the images' references."""
        messages, images, tools = read_conversation(as_messages(record))
        return self._chat.plain(messages, tools), images

    def write(self, content: list[dict[str, Any]], media: Sequence[Media]) -> list[dict[str, Any]]:
        """See [`Form`]."""
        return write_boxes(content, media, self._boxes)

    def measure(
        self, contents: Sequence[list[dict[str, Any]]], blocks: Sequence[Sequence[int]]
    ) -> Iterator[list[Piece] | SampleError]:
        """See [`Form`]."""
        rendered: list[Any] = []
        for messages in contents:
            try:
                rendered.append(self._chat.pieces(messages))
            except SampleError as error:
                rendered.append(error)
        usable = [i for i, one in enumerate(rendered) if not isinstance(one, SampleError)]
        lengths = self._chat.lengths([rendered[i] for i in usable], [blocks[i] for i in usable])
        for one, own in zip(rendered, blocks, strict=True):
            if isinstance(one, SampleError):
                yield one
                continue
            prefix = self._chat.prefix(one, own[0]) if self._shares and own else None
            yield [Piece(None, None, *next(lengths), prefix and Prefix(*prefix))]

    def document(
        self, content: list[dict[str, Any]], entries: dict[str, int] | None, blocks: list[list[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """See [`Form`]."""
        return self._chat.document(content, blocks)


def conversation_format(documents: DocumentProcessor, tool_form: ToolForm = TOOL_FORMS[0]) -> ConversationFormat:
    """How a family's conversations become ids."""
    return ConversationFormat(documents.tokenizer, documents.chat_template, documents.media_strings, tool_form)


def is_turns(value: Any) -> bool:
    """Whether a field has the turns of FineVision and the Cauldron: `[{"user", "assistant"}]`."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "assistant" in value[0]


def as_messages(record: Any) -> Any:
    """A row of FineVision's or the Cauldron's in Hugging Face's form, whose images stand first; others as they are."""
    if not isinstance(record, Mapping) or not is_turns(record.get(TURNS)):
        return record
    messages = []
    for turn in record[TURNS]:
        if not isinstance(turn, Mapping):
            raise SampleError("bad_turn", f"a turn is a {type(turn).__name__}")
        if turn.get("system"):
            raise SampleError("ambiguous_conversation", "a turn of user and assistant has a system prompt")
        others = {name: value for name, value in turn.items() if name in (*FLAGS, *UNREAD)}
        messages += [{**others, "role": role, "content": turn.get(role)} for role in ("user", "assistant")]
    return {**{name: value for name, value in record.items() if name != TURNS}, "messages": messages}
