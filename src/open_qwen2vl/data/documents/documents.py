"""Documents of a plan: planned group by group, without decoding an image, and read one by one.

    records.py ── forms.py ─► texts or messages ─► pieces ─► Document: location of its record, entries, images, lengths
                           └► record_images.py ─► where the images are, and how large for a family that asks

A record that cannot be used is left out by the name of a reason, with its key; one whose image turns out to be broken
is left out when it is read.
"""

import os
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...families.interface import DocumentProcessor, Media, VisionWork
from ...files import shard_path
from ...processing.media_records import Video
from ...processing.sample_error import SampleError
from ..engine.engine import collection_paused
from ..storage.image_sizes import upright_size
from ..storage.tars import sample_uid
from .forms import make_form, video_extensions
from .record_images import PlannedImage, RecordImages, image_name
from .records import Found, RecordLocation, RecordReader, ShardRecords

CHUNK = 1024  # records whose texts are tokenised at once


class Document(NamedTuple):
    """A document of a plan."""

    shard: int  # index of its file in the plan's list
    key: str  # name of its record
    uid: str  # 32 hex digits
    record: RecordLocation  # where that is
    entries: tuple[int, int] | None  # the first of the record's entries and their number; None for all
    tokens: int  # positions that it takes
    images: list[PlannedImage]  # its images in reading order
    labels: int  # labelled positions
    patches: int  # of its images, the unit of visual load


class Skipped(NamedTuple):
    """What a plan leaves out: file as in the plan, key, reason, and the message with the path as given."""

    file: str
    key: str
    reason: str
    detail: str


class Group(NamedTuple):
    """What becomes one part of a plan."""

    folder: Path  # folder of the plan
    shards: range  # indices of its files in the plan's list
    # All that its part depends on: the plan's options, `shards` as `describe_shard` tells them and, where a file has
    # several groups, `range`: the first byte or row of this one and that behind it.
    settings: dict[str, Any]


class GroupDocuments(NamedTuple):
    """The documents of a group in the order of the files, what was left out, members that belong to no sample, and
    videos that break off, of which the rest is used.
    """

    documents: list[Document]
    skipped: list[Skipped]
    ignored_members: int
    broken_videos: int


@collection_paused()
def plan_group(group: Group, documents: DocumentProcessor) -> GroupDocuments:
    """Plan a group; each piece of a record is either a document or named with a reason."""
    planned = GroupDocuments([], [], 0, 0)
    for number, shard in zip(group.shards, group.settings["shards"], strict=True):
        planner = _Planner(group, number, shard, documents)
        planner.run()
        planned = GroupDocuments(
            planned.documents + planner.documents,
            planned.skipped + planner.skipped,
            planned.ignored_members + planner.records.ignored_members,
            planned.broken_videos + planner.broken_videos,
        )
    return planned


class _Planner:
    """Plans the records of one file, or of a part of it."""

    def __init__(self, group: Group, number: int, shard: dict[str, Any], family: DocumentProcessor):
        settings, path = group.settings, shard_path(group.folder, shard)
        self._settings, self._number, self._family = settings, number, family
        self._file, self._name = shard["path"], os.path.basename(path)
        self._form = make_form(settings, family)
        self.records = ShardRecords(
            path, settings["text_format"], self._form.columns, self._form.max_bytes, video_extensions(settings)
        )
        paths = [""] * number + [path]  # images find their own file by its number
        reader = RecordReader(paths, settings["text_format"], self._form.columns, self._form.max_bytes)
        self._images = RecordImages(group.folder, paths, settings["images"], reader)
        # Of a family without sizes all images are one Media, whose block is asked for once.
        self._cost = lru_cache(1 << 16)(
            lambda media: (len(family.placeholder_ids(media)), family.vision_work(media).patches)
        )
        self.documents: list[Document] = []
        self.skipped: list[Skipped] = []
        self.broken_videos = 0

    def run(self) -> None:
        """Go through the records."""
        records = iter(
            self.records.find(*self._settings.get("range", ()), needs_image=self._form.needs_image,
                              with_images=self._family.needs_sizes)
        )  # fmt: skip
        while chunk := list(islice(records, CHUNK)):
            self._plan(chunk)
        # Known only behind the last record; they stand first.
        self.skipped[:0] = [Skipped(self._file, key, error.reason, str(error)) for key, error in self.records.skipped]

    def _plan(self, chunk: list[Found]) -> None:
        read, contents, images, costs = [], [], [], []
        for found in chunk:
            try:
                if isinstance(found.record, SampleError):
                    raise found.record
                content, references = self._form.parse(found.record)
                placed = [self._locate(found, reference) for reference in references]
                media = [image.media for image in placed]
                cost = [self._cost(one) for one in media]
                content = self._form.write(content, media)
            except SampleError as error:
                self._skip(found, error)
                continue
            read.append(found)
            contents.append(content)
            images.append(placed)
            costs.append(cost)
        # A chunk in one call of the tokenizer: one a record takes several times as long.
        measured = self._form.measure(contents, [[length for length, _ in cost] for cost in costs])
        for found, content, placed, cost, pieces in zip(read, contents, images, costs, measured, strict=True):
            if isinstance(pieces, SampleError):
                self._skip(found, pieces)
            else:
                self._add(found, content, placed, cost, pieces)

    def _locate(self, found: Found, reference: Any) -> PlannedImage:
        placed = self._images.find(self._number, found, reference, self.records.samples)
        read = self._images.header(self._number, found, reference, placed)
        if isinstance(reference, Video):
            media, is_broken = self._family.describe_video(read)
            self.broken_videos += is_broken
            return placed._replace(**{name: getattr(media, name) for name in ("width", "height", "frames", "fps")})
        if not self._family.needs_sizes:
            # A plan is the same with and without an index, which knows sizes.
            return placed._replace(width=0, height=0) if placed.width else placed
        if placed.width:
            return placed
        width, height = upright_size(read)
        return placed._replace(width=width, height=height)

    def _add(
        self, found: Found, content: Any, placed: list[PlannedImage], cost: list[tuple[int, int]], pieces: list
    ) -> None:
        record = found.record if self._form.keeps_uid else None
        uid = found.uid or sample_uid(record, self._name, found.position)
        before = 0
        for first, count, tokens, labels in pieces:
            after = len(placed) if first is None else before + content[first : first + count].count(None)
            if tokens > self._settings["max_length"]:
                self._skip(found, SampleError("too_long", f"{tokens} tokens"))
            else:
                entries = None if first is None else (first, count)
                patches = sum(patches for _, patches in cost[before:after])
                self.documents.append(
                    Document(self._number, found.key, uid, found.location, entries, tokens, placed[before:after],
                             labels, patches)
                )  # fmt: skip
            before = after

    def _skip(self, found: Found, error: SampleError) -> None:
        # A path may hold bytes that are no text, which no column of text takes.
        detail = str(error).encode(errors="backslashreplace").decode()
        self.skipped.append(Skipped(self._file, found.key, error.reason, detail))


class ReadDocument(NamedTuple):
    """A document as it is trained: int64 ids and labels `(S,)`, positions `(rope_rows, S)`, and its media."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    media: dict[str, torch.Tensor]
    count: int
    work: VisionWork


class DocumentReader:
    """Reads the documents of a plan, for one process."""

    def __init__(self, folder: Path, plan: dict[str, Any], documents: DocumentProcessor):
        paths = [shard_path(folder, shard) for shard in plan["shards"]]
        self._family, self._what = documents, plan["text_format"]
        self._form = make_form(plan, documents)
        self._records = RecordReader(paths, self._what, self._form.columns, self._form.max_bytes)
        self._images = RecordImages(folder, paths, plan["images"], self._records)

    def read(self, document: dict[str, Any]) -> ReadDocument:
        """A document of a row of the plan; a [`SampleError`] if its record or an image cannot be used any more."""
        content, references = self._form.parse(self._records.read(document))
        entries, images = document["entries"], document["images"]
        if entries is not None:
            before = content[: entries["first"]].count(None)
            own = content[entries["first"] : entries["first"] + entries["count"]].count(None)
            references = references[before : before + own]
        # A file may have changed since it was planned; what does not fit is dropped and counted.
        if len(references) != len(images):
            raise SampleError(f"changed_{self._what}", f"{len(references)} images, not as planned")
        planned = [PlannedImage(**image) for image in images]
        media = [image.media for image in planned]
        if [isinstance(reference, Video) for reference in references] != [one.kind == "video" for one in media]:
            raise SampleError(f"changed_{self._what}", "images and videos are in another order than planned")
        blocks = [self._family.placeholder_ids(one) for one in media]
        input_ids, labels = self._form.document(self._form.write(content, media), entries, blocks)
        # One token more, and the pack is longer than all others of the plan.
        if len(input_ids) != document["tokens"]:
            raise SampleError(f"changed_{self._what}", f"{len(input_ids)} tokens, {document['tokens']} in the plan")
        tensors = [self._read_media(document, *one) for one in zip(references, planned, strict=True)]
        return finish_document(self._family, input_ids, labels, media, tensors)

    def _read_media(self, document: dict[str, Any], reference: Any, image: PlannedImage) -> dict[str, torch.Tensor]:
        data = self._images.read(document, reference, image)
        try:
            return self._family.read_media(data, image.media)
        except SampleError as error:
            raise SampleError(error.reason, f"{image_name(reference)}: {error}") from error


def finish_document(
    family: DocumentProcessor,
    input_ids: np.ndarray,
    labels: np.ndarray,
    media: list[Media],
    tensors: list[dict[str, torch.Tensor]],
) -> ReadDocument:
    """Add what follows from ids and media: the media joined, positions, and what encoding them costs."""
    joined = join_media(family, tensors)
    work = VisionWork(*map(sum, zip(VisionWork(), *map(family.vision_work, media), strict=True)))
    return ReadDocument(input_ids, labels, family.position_ids(input_ids, joined), joined, len(media), work)


def join_media(family: DocumentProcessor, tensors: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of several images or documents, joined by their names along the first dimension."""
    parts = [family.empty_media(), *tensors]
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0]}


def empty_document(family: DocumentProcessor) -> ReadDocument:
    """No document at all: `S` = 0."""
    nothing = np.empty(0, np.int64)
    return ReadDocument(
        nothing, nothing, np.empty((family.rope_rows, 0), np.int64), family.empty_media(), 0, VisionWork()
    )


def pack_item(family: DocumentProcessor, documents: list[ReadDocument], dropped: Counter) -> dict[str, Any]:
    """An item of a dataset: the documents behind each other, and what the collator and the model need to know."""
    # Nothing first, for a pack that has lost all its documents.
    ids, labels, positions, media, counts, works = zip(empty_document(family), *documents, strict=True)
    input_ids, position_ids = (torch.from_numpy(np.concatenate(rows, axis=-1)) for rows in (ids, positions))
    names = family.placeholder_names
    return {
        "input_ids": input_ids,
        "position_ids": position_ids[0] if family.rope_rows == 1 else position_ids,
        "labels": torch.from_numpy(np.concatenate(labels)),
        **join_media(family, media),
        **family.forward_options(),
        "placeholders": {name: torch.nonzero(input_ids == token).squeeze(1) for name, token in names.items()},
        "on_host": family.host_names,
        "media": sum(counts),
        "vision_work": VisionWork(*map(sum, zip(*works, strict=True))),
        "dropped": dict(dropped),
    }
