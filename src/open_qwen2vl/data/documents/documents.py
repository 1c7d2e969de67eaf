"""Documents of a plan: planned group by group, without decoding an image, and read one by one.

    records.py ── forms.py ─► texts or messages ─► pieces ─► Document: location of its record, entries, images, lengths
                           └► record_images.py ─► where the images are, and how large for a family that asks

A record that cannot be used is left out by the name of a reason, with its key; one whose image turns out to be broken
is left out when it is read.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ...families.interface import DocumentProcessor
from ...files import ShardPaths, shard_path
from ...places import OpenFile, Place, is_remote, open_file, place
from ...processing.media_records import Video
from ...processing.sample_error import SampleError
from ...range_reads import PATIENCE
from ...transfers import local_copy
from ..engine.engine import collection_paused
from ..storage.image_sizes import upright_size
from ..storage.shard_cache import ShardCache
from ..storage.tar_index import index_path
from ..storage.tars import sample_uid
from ..storage.uids import contains_uids, parse_uids, read_uids
from .forms import Piece, make_form, video_extensions
from .items import Document, ReadDocument, Shareable, finish_document
from .record_images import PlannedImage, RecordImages, image_name
from .records import TAR, Found, RecordReader, ShardRecords
from .shared_pictures import picture_of

# The reasons of documents in a bucket that does not answer, and of those that it does not have or not give.
UNREACHABLE, UNREADABLE = "store_unreachable", "unreadable_object"
CHUNK = 1024  # records whose texts are tokenised at once


class Skipped(NamedTuple):
    """What a plan leaves out: file as in the plan, key, reason, and the message with the path as given."""

    file: str
    key: str
    reason: str
    detail: str


class Group(NamedTuple):
    """What becomes one part of a plan."""

    folder: Place  # folder of the plan
    shards: range  # indices of its files in the plan's list
    # All that its part depends on: the plan's options, `shards` as `describe_shard` tells them and, where a file has
    # several groups, `range`: the first byte or row of this one and that behind it.
    settings: dict[str, Any]
    indexes: Place | None = None  # folder of the indexes of tars that have none beside them; None where none are made


class GroupDocuments(NamedTuple):
    """The documents of a group in the order of the files, what was left out, members that belong to no sample, videos
    that break off, of which the rest is used, what became of the indexes of tars, and samples that are in no subset.
    """

    documents: list[Document]
    skipped: list[Skipped]
    ignored_members: int
    broken_videos: int
    indexes: Counter[str]
    not_chosen: int


@collection_paused()
def plan_group(group: Group, documents: DocumentProcessor) -> GroupDocuments:
    """Plan a group; each piece of a record is either a document or named with a reason."""
    planned = GroupDocuments([], [], 0, 0, Counter(), 0)
    for number, shard in zip(group.shards, group.settings["shards"], strict=True):
        with _at_hand(shard_path(group.folder, shard), group.indexes is not None) as path:
            planner = _Planner(group, number, shard, documents, path)
            planner.run()
        planned = GroupDocuments(
            planned.documents + planner.documents,
            planned.skipped + planner.skipped,
            planned.ignored_members + planner.records.ignored_members,
            planned.broken_videos + planner.broken_videos,
            planned.indexes + Counter([planner.records.index] if planner.records.index else ()),
            planned.not_chosen + planner.not_chosen,
        )
    return planned


@contextlib.contextmanager
def _at_hand(path: str, is_indexed: bool) -> Iterator[str]:
    """A file, or a copy of a remote tar that no index is made of: its headers and texts lie all over it."""
    if path.endswith(TAR) and is_remote(path) and not is_indexed and not index_path(place(path)).exists():
        with local_copy(path) as copy:
            yield str(copy)
    else:
        yield path


class _Content(NamedTuple):
    """What became of a record, or of a branch of it, on the way to documents."""

    found: Found
    branch: int | None  # its number
    content: Any
    images: list[PlannedImage]
    costs: list[tuple[int, int]]  # positions and patches of each image
    picture: tuple | None  # what tells its first image from others, where pictures are shared


class _Planner:
    """Plans the records of one file, or of a part of it."""

    def __init__(self, group: Group, number: int, shard: dict[str, Any], family: DocumentProcessor, path: str):
        settings = group.settings
        self._settings, self._number, self._family = settings, number, family
        self._file, self._name = shard["path"], os.path.basename(path)
        self._form, self._shares = make_form(settings, family), settings.get("share_images", False)
        self.records = ShardRecords(
            path,
            settings["text_format"],
            self._form.columns,
            self._form.max_bytes,
            video_extensions(settings),
            group.indexes,
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
        self.broken_videos = self.not_chosen = 0
        subset = settings.get("subset")
        self._subset = None if subset is None else read_uids(shard_path(group.folder, subset))

    def run(self) -> None:
        """Go through the records."""
        records = iter(
            self.records.find(*self._settings.get("range", ()), needs_image=self._form.needs_image,
                              with_images=self._family.needs_sizes or self._shares)
        )  # fmt: skip
        while chunk := list(islice(records, CHUNK)):
            self._plan(self._chosen(chunk))
        # Known only behind the last record; they stand first.
        self.skipped[:0] = [Skipped(self._file, key, error.reason, str(error)) for key, error in self.records.skipped]

    def _chosen(self, chunk: list[Found]) -> list[Found]:
        """Those that the subset of uids names; all without one."""
        if self._subset is None or not chunk:
            return chunk
        inside = contains_uids(self._subset, *parse_uids([self._uid(found) for found in chunk]))
        self.not_chosen += len(chunk) - int(inside.sum())
        return [found for found, is_inside in zip(chunk, inside, strict=True) if is_inside]

    def _uid(self, found: Found) -> str:
        record = found.record if self._form.keeps_uid else None
        return found.uid or sample_uid(record, self._name, found.position)

    def _plan(self, chunk: list[Found]) -> None:
        parsed = []
        for found, branch in self._conversations(chunk):
            try:
                parsed.append(self._parse(found, branch))
            except SampleError as error:
                self._skip(found, error)
        # A chunk in one call of the tokenizer: one a record takes several times as long.
        measured = self._form.measure([one.content for one in parsed],
                                      [[length for length, _ in one.costs] for one in parsed])  # fmt: skip
        for one, pieces in zip(parsed, measured, strict=True):
            if isinstance(pieces, SampleError):
                self._skip(one.found, pieces)
            else:
                self._add(one, pieces)

    def _conversations(self, chunk: list[Found]) -> Iterator[tuple[Found, int | None]]:
        """The records, and of one with branches each of these with its number."""
        for found in chunk:
            try:
                if isinstance(found.record, SampleError):
                    raise found.record
                branches = self._form.split(found.record)
            except SampleError as error:
                self._skip(found, error)
                continue
            if branches is None:
                yield found, None
            else:
                yield from ((found._replace(record=one), number) for number, one in enumerate(branches))

    def _parse(self, found: Found, branch: int | None) -> _Content:
        content, references = self._form.parse(found.record)
        placed = [self._locate(found, reference) for reference in references]
        media = [image.media for image in placed]
        costs = [self._cost(one) for one in media]
        picture = None
        if self._shares and placed:
            picture = picture_of(self._number, placed[0], references[0], found.record)
        return _Content(found, branch, self._form.write(content, media), placed, costs, picture)

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

    def _add(self, one: _Content, pieces: list[Piece]) -> None:
        found, before = one.found, 0
        uid = self._uid(found)
        for piece in pieces:
            first, count = piece.first, piece.count
            after = len(one.images) if first is None else before + one.content[first : first + count].count(None)
            if piece.tokens > self._settings["max_length"]:
                self._skip(found, SampleError("too_long", f"{piece.tokens} tokens"))
            else:
                entries = (first, count) if one.branch is None else (one.branch, 1)
                patches = [patches for _, patches in one.costs[before:after]]
                shareable = piece.prefix and Shareable(one.picture, piece.prefix, patches[0])
                self.documents.append(
                    Document(self._number, found.key, uid, found.location, None if entries[0] is None else entries,
                             piece.tokens, one.images[before:after], 0, piece.labels, sum(patches), shareable)
                )  # fmt: skip
            before = after

    def _skip(self, found: Found, error: SampleError) -> None:
        # A path may hold bytes that are no text, which no column of text takes.
        detail = str(error).encode(errors="backslashreplace").decode()
        self.skipped.append(Skipped(self._file, found.key, error.reason, detail))


class Remote(NamedTuple):
    """How files of a bucket are read."""

    patience: float = PATIENCE  # seconds in which a range is asked for again and again
    cache: ShardCache | None = None  # reads whole shards from the disk, instead of ranges from the bucket


RANGES = Remote()


class DocumentReader:
    """Reads the documents of a plan, for one process."""

    def __init__(self, folder: Place, plan: dict[str, Any], documents: DocumentProcessor, remote: Remote = RANGES):
        paths, shards = ShardPaths(folder, plan["shards"]), plan["shards"]
        self._family, self._what, self._patience = documents, plan["text_format"], remote.patience
        self._form = make_form(plan, documents)

        def open_shard(number: int) -> OpenFile:
            if remote.cache is not None and is_remote(paths[number]):
                return remote.cache.open(paths[number], shards[number])
            return open_file(paths[number])

        self._records = RecordReader(paths, self._what, self._form.columns, self._form.max_bytes, open_shard)
        self._images = RecordImages(folder, paths, plan["images"], self._records)

    def read_ahead(self, rows: list[dict[str, Any]], again: bool = False) -> None:
        """Fetch at once what rows of the plan have in files of a bucket; what fails is told when they are read.

        `again` fetches some of them anew, beside what is there of the others.
        """
        with contextlib.suppress(OSError):
            self._records.read_ahead(rows, self._patience, again)

    def read(self, rows: list[dict[str, Any]]) -> list[ReadDocument]:
        """As [`_read`]; what a network or a store does to them is a [`SampleError`] too."""
        try:
            return self._read(rows)
        except OSError as error:
            if error.filename is None or not is_remote(str(error.filename)):
                raise
            is_gone = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
            raise SampleError(UNREADABLE if is_gone else UNREACHABLE, str(error)) from error

    def _read(self, rows: list[dict[str, Any]]) -> list[ReadDocument]:
        """A document of the plan and its branches, from their rows, the picture decoded once.

        A [`SampleError`] if any record or image of theirs cannot be used any more.
        """
        read: list[ReadDocument] = []
        picture: list[dict[str, torch.Tensor]] = []
        for row in rows:
            shared = row["shared"]
            input_ids, labels, references, planned = self._lay_out(row)
            if shared and not np.array_equal(input_ids[:shared], read[0].input_ids[:shared]):
                raise SampleError(f"changed_{self._what}", f"{row['key']} does not begin as others on its picture")
            own = [*zip(references, planned, strict=True)][1 if shared else 0 :]
            tensors = [self._read_media(row, *one) for one in own]
            media = [image.media for image in planned]
            read.append(
                finish_document(self._family, input_ids, labels, media, picture[: bool(shared)] + tensors, shared)
            )
            picture = picture or tensors[:1]
        return read

    def _lay_out(self, document: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, list[Any], list[PlannedImage]]:
        """Ids and labels of a row of the plan, those of a branch with what it shares, and its images."""
        record, entries, images = self._records.read(document), document["entries"], document["images"]
        if (branches := self._form.split(record)) is not None:
            if entries is None or entries["first"] >= len(branches):
                raise SampleError(f"changed_{self._what}", f"{len(branches)} branches, not as planned")
            record, entries = branches[entries["first"]], None
        content, references = self._form.parse(record)
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
        tokens = document["tokens"] + document["shared"]
        # One token more, and the pack is longer than all others of the plan.
        if len(input_ids) != tokens:
            raise SampleError(f"changed_{self._what}", f"{len(input_ids)} tokens, {tokens} in the plan")
        return input_ids, labels, references, planned

    def _read_media(self, document: dict[str, Any], reference: Any, image: PlannedImage) -> dict[str, torch.Tensor]:
        data = self._images.read(document, reference, image)
        try:
            return self._family.read_media(data, image.media)
        except SampleError as error:
            raise SampleError(error.reason, f"{image_name(reference)}: {error}") from error
