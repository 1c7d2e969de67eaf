"""Containers: whatever file records stand in, they are found to be planned and read again one by one.

    tar                KEY.txt beside KEY.jpg; KEY.json with images beside it   ┐
    json, jsonl, csv   a record in some bytes                                   ┼► find_records, RecordReader
    parquet, arrow     a row, decoded through its batch                         ┘

What a record means is the business of forms.py; where its images are, of record_images.py.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ...places import OpenFile, Place, RemoteFile, open_file, place, read_ranges
from ...processing.media_records import Video
from ...processing.sample_error import SampleError
from ..storage.csv_records import csv_header, csv_spans, read_csv_record
from ..storage.json_records import read_record, record_spans
from ..storage.open_files import NOTHING, Newest, Span
from ..storage.row_values import row_values
from ..storage.tables import Columns, RowTable
from ..storage.tar_index import TarIndex, index_elsewhere, index_path, make_shard_index, read_shard_index
from ..storage.tars import (
    IMAGE_EXTENSIONS,
    MAX_JSON_BYTES,
    VIDEO_EXTENSIONS,
    Sample,
    ShardIndex,
    has_dotted_key,
    index_shard,
    read_json,
    read_member,
    read_together,
    sample_uid,
    spans_of,
)
from .texts import Texts, decode_caption

logger = logging.getLogger(__name__)

OWN = -1  # root of an image that is a member of its record's tar
BATCHES = 8  # decoded batches of tables that one process keeps
MAX_DOCUMENT_BYTES = MAX_JSON_BYTES  # of an interleaved document, which may hold its images
TAR, JSON, CSV, TABLES = (".tar",), (".json", ".jsonl"), (".csv",), (".parquet", ".arrow")


class RecordLocation(NamedTuple):
    """Where a record is: the bytes of a file, or the row of a table."""

    offset: int | None
    size: int | None
    row: int | None = None


class OwnImage(NamedTuple):
    """The image of a caption in a tar, or its video in a [`Video`]: the member `KEY.jpg`, or of another image's or
    video's extension; 0 what is not known.
    """

    offset: int = 0
    size: int = 0
    width: int = 0
    height: int = 0


class Found(NamedTuple):
    """A record and where it is."""

    location: RecordLocation
    record: Any  # parsed, in a tar of captions already [`Texts`], or the [`SampleError`] that it could not be
    key: str  # its name: of a tar's sample its key, else its id, or its position where it has none
    position: str  # names it within its file
    uid: str | None = None  # 32 hex digits, where they stand beside it


class ShardRecords:
    """The records of a file, or of a part of it, in its order."""

    def __init__(
        self,
        path: str,
        text_format: str,
        columns: Columns,
        max_bytes: int | None = None,
        videos: tuple[str, ...] = VIDEO_EXTENSIONS,
        indexes: Place | None = None,
    ):
        self._path, self._text_format, self._columns, self._max_bytes = path, text_format, columns, max_bytes
        self._videos = videos  # extensions of videos of captions
        self._indexes = indexes  # folder where indexes of tars of captions are that have none beside them
        self.index: str | None = None  # what became of the index of a tar of captions
        self.samples: dict[str, Sample] | None = None  # of a tar of documents, by key
        self.skipped: list[tuple[str, SampleError]] = []  # what of a tar is no sample, by key; complete at the end
        self.ignored_members = 0  # members of a tar that belong to no sample

    def find(self, start: int = 0, stop: int = 0, needs_image: bool = True, with_images: bool = False) -> Iterable:
        """The records ([`Found`]) between two bytes or rows; of a tar all. Rows with images' bytes only on request."""
        if self._path.endswith(TAR):
            return self._find_in_tar(needs_image)
        if self._path.endswith(TABLES):
            return self._find_rows(start, stop, with_images)
        return self._find_in_bytes(start, stop)

    def _find_rows(self, start: int, stop: int, with_images: bool) -> Iterator[Found]:
        table = RowTable(self._path, self._columns)
        rows = table.rows(start, stop) if with_images else table.rows_to_plan(start, stop)
        for number, row in rows:
            position = f"row {number}"
            yield Found(RecordLocation(None, None, number), row, _key(row, position), position)
        table.close()

    def _find_in_bytes(self, start: int, stop: int) -> Iterator[Found]:
        spans = csv_spans if self._path.endswith(CSV) else record_spans
        with open_file(self._path, whole=True) as file:
            read = _bytes_reader(self._path, file, self._max_bytes)
            for offset, size in spans(self._path, start, stop):
                try:
                    record = read(offset, size)
                except SampleError as error:
                    record = error
                if record is not None:  # a blank line is no record
                    position = f"byte {offset}"
                    yield Found(RecordLocation(offset, size), record, _key(record, position), position)

    def _find_in_tar(self, needs_image: bool) -> Iterable[Found]:
        if self._text_format in ("caption", "text"):
            return self._find_indexed(needs_image)
        samples, uids = self._indexed_documents() or (self._samples(), None)
        self.samples = {sample.key: sample for sample in samples}
        return self._find_documents(samples, uids)

    def _find_indexed(self, needs_image: bool) -> Iterable[Found]:
        """Captions by the index beside the tar, else by that which was made of it, which is made now if need be."""
        index = read_shard_index(self._path)
        if index is not None:
            self._take(index)
            found = self._find_captions(index, needs_image)
            if index.texts is not None:
                self.index = "read"
                return found
            # All before any is given out: that an index is another tar's may show at the last member.
            found = list(found)
            if not any(isinstance(one.record, SampleError) and one.record.reason == "moved_member" for one in found):
                self.index = "read without its texts, which are of another time than the tar"
                return found
            logger.warning("%s: its index is that of another tar: not used", self._path)
        is_refused = index is not None or index_path(place(self._path)).exists()
        if self._indexes is None:
            self.index = "not used" if is_refused else "missing"
            index = index_shard(self._path)
            self._take(index)
            return self._find_captions(TarIndex(index.samples, None, None), needs_image)
        own = index_elsewhere(self._indexes, self._path)
        index = read_shard_index(self._path, own)
        self.index = "read" if index is not None and index.texts is not None else "made"
        index = index if self.index == "read" else make_shard_index(self._path, own)
        self.index += " in place of one that is not its" * is_refused
        self._take(index)
        return self._find_captions(index, needs_image)

    def _indexed_documents(self) -> tuple[list[Sample], list[str]] | None:
        """What an index names, if the headers of all records stand where it says."""
        index = read_shard_index(self._path)
        with open_file(self._path, whole=True) as file:
            try:
                for sample in index.samples if index else ():
                    if "json" in sample.members:
                        read_member(file, f"{sample.key}.json", *sample.members["json"], limit=0)
            except SampleError:
                logger.warning("%s: its index is that of another tar: not used", self._path)
                return None
        return index and index[:2]

    def _samples(self) -> list[Sample]:
        index = index_shard(self._path)
        self._take(index)
        return index.samples

    def _take(self, index: TarIndex | ShardIndex) -> None:
        self.skipped = [(key, SampleError(reason, "")) for key, reason in index.skipped]
        self.ignored_members = index.ignored_members

    def _find_captions(self, index: TarIndex, needs_image: bool) -> Iterator[Found]:
        name = os.path.basename(self._path)
        with open_file(self._path, whole=index.texts is None) as file:
            for number, sample in enumerate(index.samples):
                text = index.texts[number] if index.texts else None
                try:
                    (*image, (_, offset, size)), caption = caption_members(
                        file, sample, needs_image, self._videos, text
                    )
                except SampleError as error:
                    yield Found(RecordLocation(None, None), error, sample.key, sample.key)
                    continue
                uid = index.uids[number] if index.uids else sample_uid(read_json(file, sample), name, sample.key)
                own = [OwnImage(*location, *sample.image_sizes.get(ext, ())) for ext, *location in image]
                if image and image[0][0] in self._videos:
                    own = [Video(OwnImage(*image[0][1:]))]
                record = Texts([*(None for _ in own), caption], own)
                yield Found(RecordLocation(offset, size), record, sample.key, sample.key, uid)

    def _find_documents(self, samples: list[Sample], uids: list[str] | None) -> Iterator[Found]:
        """The samples that have a json; the others are images of theirs."""
        with open_file(self._path, whole=True) as file:
            for number, sample in enumerate(samples):
                if "json" not in sample.members:
                    continue
                location = RecordLocation(*sample.members["json"])
                try:
                    record = _read_tar_json(file, sample.key, location.offset, location.size)
                except SampleError as error:
                    record = error
                yield Found(location, record, sample.key, sample.key, uids[number] if uids else None)


class RecordReader:
    """The records of a plan's files, read again, for one process; `open_shard` opens a file by its number."""

    def __init__(
        self,
        paths: Sequence[str],
        text_format: str,
        columns: Columns,
        max_bytes: int | None = None,
        open_shard: Callable[[int], OpenFile] | None = None,
    ):
        self._paths, self._text_format, self._max_bytes = paths, text_format, max_bytes
        self._files = Newest(open_shard or (lambda shard: open_file(paths[shard])))
        self._fetched: list[RemoteFile] = []  # those that hold what was read ahead
        self._ahead = (-1, NOTHING)  # of the last document that was read, its tar and the bytes beside its record
        self._tables = Newest(lambda shard: RowTable(paths[shard], columns))
        # A batch is decoded whole, and other documents of a pack have rows in it.
        self._batch = lru_cache(BATCHES)(lambda shard, batch: self._tables[shard].read_batch(batch))

    def read(self, document: dict[str, Any]) -> Any:
        """The record of a plan's document, as [`Found`] had it; images of rows with their bytes."""
        shard, location = document["shard"], RecordLocation(**document["record"])
        if location.row is not None:
            return self._read_row(shard, location.row)
        file = self._files[shard]
        if not self._paths[shard].endswith(TAR):
            return _bytes_reader(self._paths[shard], file, self._max_bytes)(location.offset, location.size)
        own = [(image["offset"], image["size"]) for image in document["images"] if image["root"] == OWN]
        span = read_together(file, location[:2], own)
        self._ahead = shard, span
        if self._text_format in ("caption", "text"):
            text = read_member(file, f"{document['key']}.txt", location.offset, location.size, span=span)
            own = [Video(OwnImage()) if image.get("frames") else OwnImage() for image in document["images"]]
            return Texts([*(None for _ in own), decode_caption(text)], own)
        return _read_tar_json(file, document["key"], location.offset, location.size, span)

    def read_ahead(self, documents: list[dict[str, Any]], patience: float, again: bool) -> None:
        """Fetch what documents have in remote files, all at once: a request each would be a wait each."""
        if not again:
            for file in self._fetched:
                file.ahead = []
            self._fetched = []
        members: dict[int, list[tuple[int, int]]] = {}
        for document in documents:
            shard, location = document["shard"], RecordLocation(**document["record"])
            if location.row is None and isinstance(self._files[shard], RemoteFile):
                own = [(image["offset"], image["size"]) for image in document["images"] if image["root"] == OWN]
                members.setdefault(shard, []).extend([location[:2], *own])
        wanted = [(self._files[shard], *span) for shard, own in members.items() for span in spans_of(own)]
        self._fetched += [file for file, _, _ in wanted]
        for (file, start, end), content in zip(wanted, read_ranges(wanted, patience), strict=True):
            file.ahead.insert(0, (start, end, content))  # before what came damaged

    def read_image(self, shard: int, names: list[str], offset: int, size: int, limit: int | None) -> bytes:
        """An image or video of a tar's sample, as [`read_member`]; read with its record where it lies beside it."""
        ahead, span = self._ahead
        span = span if ahead == shard else NOTHING
        return read_member(self._files[shard], names, offset, size, limit, span)

    def _read_row(self, shard: int, number: int) -> Any:
        try:
            batch, row = self._tables[shard].find(number)
        except SampleError:
            raise
        except ValueError as error:  # a table that was damaged after it was planned
            raise SampleError("corrupt_table", str(error)) from error
        for values in row_values(self._batch(shard, batch).slice(row, 1)):
            return values
        raise SampleError("corrupt_table", f"{self._paths[shard]}, batch {batch} has no row {row}")


def caption_members(
    file: OpenFile,
    sample: Sample,
    needs_image: bool = True,
    videos: tuple[str, ...] = VIDEO_EXTENSIONS,
    text: bytes | None = None,
) -> tuple[list[tuple[str, int, int]], str]:
    """Extension, offset and size of a caption sample's video or image, if it has one, and of its text; and the text.

    The `text` that an index has is not read again.
    Raises `missing_image`, `missing_caption`, `dotted_key`, `empty_image`, or as [`decode_caption`] and
    [`read_member`].
    """
    image_ext = next((ext for ext in (*videos, *IMAGE_EXTENSIONS) if ext in sample.members), None)
    if has_dotted_key(sample) and (image_ext is None or "txt" not in sample.members):
        raise SampleError("dotted_key", f"{sample.key} has dots in its name; a key ends at the first of them")
    if image_ext is None and needs_image:
        known = ", ".join((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))
        raise SampleError("missing_image", f"{sample.key} has no member {known}")
    if "txt" not in sample.members:
        raise SampleError("missing_caption", f"{sample.key} has no member txt")
    if image_ext and sample.members[image_ext][1] == 0:
        raise SampleError("empty_image", f"{sample.key}.{image_ext} has no bytes")
    text = read_member(file, f"{sample.key}.txt", *sample.members["txt"]) if text is None else text
    caption = decode_caption(text)
    return [(ext, *sample.members[ext]) for ext in (image_ext, "txt") if ext], caption


def _bytes_reader(path: str, file: OpenFile, max_bytes: int | None) -> Any:
    if path.endswith(CSV):
        header = csv_header(path)
        return lambda offset, size: read_csv_record(file, header, offset, size)
    return lambda offset, size: read_record(file, offset, size, max_bytes)


def _key(record: Any, position: str) -> str:
    name = record.get("id") if isinstance(record, dict) else None
    key = str(name) if isinstance(name, str | int) and name != "" else position
    return key.encode(errors="backslashreplace").decode()


def _read_tar_json(tar: OpenFile, key: str, offset: int, size: int, span: Span = NOTHING) -> Any:
    if size > MAX_DOCUMENT_BYTES:
        raise SampleError("record_too_large", f"{key}.json has {size:,} bytes")
    try:
        return json.loads(read_member(tar, f"{key}.json", offset, size, span=span))
    except SampleError:
        raise
    except (ValueError, RecursionError) as error:
        raise SampleError("invalid_json", f"{key}.json: {error}") from error
