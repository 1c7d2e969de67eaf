"""Interleaved documents of a plan: several images and texts in order, planned file by file, read one by one.

    tar             KEY.json ┐                                    ┌► texts ─► pieces ─► ids, labels
    json, jsonl     record   ┼ records.py ─► read_interleaved ────┤
    parquet, arrow  row      ┘                                    └► images: in the record, the tar or --images

A document of more images than nine, or longer than a pack, is split before images; each piece is a document of the
plan, which remembers its entries. A document that cannot be used is left out by the name of a reason, with its key.
"""

import json
import os
import posixpath
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...processing.sample_error import SampleError
from ...processing.text_formats import (
    MAX_INTERLEAVED_IMAGES,
    interleaved_document,
    split_interleaved,
    tokenize_interleaved,
)
from ..packing.plan_files import Document, Group, GroupDocuments, shard_path
from ..storage.image_files import MAX_IMAGE_BYTES, ImageFiles, Place
from ..storage.open_files import Newest, read_pixels
from ..storage.tables import Columns
from ..storage.tars import Sample, index_shard, read_member, sample_uid, split_member_name
from .interleaved_records import Interleaved, image_bytes, read_interleaved
from .records import Found, RecordReader, find_records, read_image

COLUMNS = Columns(("texts", "id", "uid"), ("images",))
MAX_DOCUMENT_BYTES = 256 << 20  # of JSON, which may hold its images
RULES = ("standard", "original")
OWN_TAR = -1  # the root of an image that is in its document's tar
JSON, ENTRIES = "json", "entries"  # members of a document: its record in a tar; the first of its entries, their number


def interleaved_documents(group: Group, tokenizer: PreTrainedTokenizerBase) -> GroupDocuments:
    """Plan the interleaved documents of some tars, or of a part of one other file: no image is read.

    Args:
        group ([`Group`]): tars, or one file and a range of its bytes (JSON) or rows (tables). With the `rules`
            `"original"` of its recipe documents are dropped instead of split.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.

    Returns:
        [`GroupDocuments`]: each piece of a record is either a document or named with a reason.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a record outside of a tar names an image and there is no place to look for images.
    """
    documents, skipped, ignored = [], [], 0
    for number, shard in zip(group.shards, group.recipe["shards"], strict=True):
        path = shard_path(group.folder, shard)
        if path.endswith(".tar"):
            index = index_shard(path)
            skipped += [(shard["path"], key, reason) for key, reason in index.skipped]
            ignored += index.ignored_members
            tar = {sample.key: sample.members for sample in index.samples}
            records = _find_in_tar(path, index.samples)
        else:
            tar, records = None, find_records(path, *group.recipe["range"], COLUMNS, MAX_DOCUMENT_BYTES)
        planner = _Planner(group, number, path, tar, tokenizer)
        for found in records:
            pieces, reasons = planner.plan(found)
            documents += pieces
            skipped += [(shard["path"], planner.key(found), reason) for reason in reasons]
    return GroupDocuments(documents, skipped, ignored)


class InterleavedReader:
    """Reads the interleaved documents of a plan, for one process.

    Args:
        folder (`Path`): folder of the plan.
        plan (`dict`): its content.
        processor (`OpenQwen2VLProcessor`): tokenizes and resizes.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], processor: Any):
        paths = [shard_path(folder, shard) for shard in plan["shards"]]
        self._image_seq_length = plan["image_seq_length"]
        self._processor = processor
        self._images = ImageFiles(folder, plan["images"])
        self._records = RecordReader(paths, COLUMNS, MAX_DOCUMENT_BYTES)
        self._tars = Newest(lambda shard: open(paths[shard], "rb", buffering=0))

    def read(self, document: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """Read a document.

        Args:
            document (`dict`): of a row of the plan.

        Returns:
            `tuple`: int64 `input_ids` and `labels` of shape `(S,)`, uint8 `pixel_values` of shape `(images, 3, H, W)`.

        Raises:
            SampleError: if the record or one of its images cannot be used any more, each
                with a `reason`.
        """
        texts, references = self._piece(document)
        if len(references) != len(document["images"]):
            raise SampleError("changed_interleaved", f"{len(references)} images, not as planned")
        input_ids, labels = interleaved_document(texts, self._processor.tokenizer, self._image_seq_length)
        pixels = [
            read_pixels(self._image_file(document, reference, place), self._processor)
            for reference, place in zip(references, document["images"], strict=True)
        ]
        return input_ids, labels, torch.cat([self._processor.resize_images([]), *pixels])

    def _piece(self, document: dict[str, Any]) -> Interleaved:
        member, entries = document["members"]
        if member["ext"] == JSON:
            tar = self._tars[document["shard"]].fileno()
            record = _read_tar_record(tar, document["key"], member["offset"], member["size"])
        else:
            record = self._records.read(document)
        texts, references = read_interleaved(record)
        start, stop = entries["offset"], entries["offset"] + entries["size"]
        before = texts[:start].count(None)
        return Interleaved(texts[start:stop], references[before : before + texts[start:stop].count(None)])

    def _image_file(self, document: dict[str, Any], reference: Any, place: dict[str, int] | None) -> bytes:
        if place is None:
            return read_image({"bytes": image_bytes(reference)}, None, self._images)
        if not isinstance(reference, str):
            raise SampleError("changed_interleaved", "an image is not named by a path, as it was when planned")
        if place["root"] != OWN_TAR:
            return read_image(reference, place, self._images)
        tar = self._tars[document["shard"]].fileno()
        for name in _member_names(document["key"], reference):
            try:
                return read_member(tar, name, place["offset"], place["size"])
            except SampleError as error:
                moved = error
        raise moved


class _Planner:
    """Plans the records of one file."""

    def __init__(
        self,
        group: Group,
        number: int,
        path: str,
        tar: dict[str, dict[str, tuple[int, int]]] | None,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self._recipe = group.recipe
        self._images = ImageFiles(group.folder, group.recipe["images"])
        self._number = number
        self._name = os.path.basename(path)
        self._tar = tar  # offset and size of its members, by key and extension
        self._tokenizer = tokenizer

    def key(self, found: Found) -> str:
        """What a record is called: in a tar always its sample's key."""
        return found.key if self._tar is None else found.position

    def plan(self, found: Found) -> tuple[list[Document], list[str]]:
        """The documents that a record becomes, and the reasons for which it, or pieces of it, become none."""
        try:
            if isinstance(found.record, SampleError):
                raise found.record
            texts, references = read_interleaved(found.record)
            if not references:
                raise SampleError("no_image", "a document without an image")
            places = [self._place(found, reference) for reference in references]
            pieces = self._pieces(texts)
        except SampleError as error:
            return [], [error.reason]
        uid = sample_uid(found.record, self._name, found.position)
        documents = []
        for start, stop, tokens in pieces:
            first, images = texts[:start].count(None), texts[start:stop].count(None)
            members = [found.place, (ENTRIES, start, stop - start)]
            documents.append(
                Document(self._number, self.key(found), uid, members, tokens, places[first : first + images])
            )
        fitting = [document for document in documents if document.tokens <= self._recipe["max_length"]]
        return fitting, ["too_long"] * (len(documents) - len(fitting))

    def _pieces(self, texts: list[str | None]) -> list[tuple[int, int, int]]:
        text_ids = tokenize_interleaved(self._tokenizer, texts)
        image_seq_length, max_length = self._recipe["image_seq_length"], self._recipe["max_length"]
        if self._recipe["rules"] == RULES[1]:
            if texts.count(None) > MAX_INTERLEAVED_IMAGES:
                raise SampleError("too_many_images", f"more than {MAX_INTERLEAVED_IMAGES} images")
            return split_interleaved(texts, text_ids, image_seq_length, sys.maxsize)
        most = min(MAX_INTERLEAVED_IMAGES, self._recipe["max_images"] or MAX_INTERLEAVED_IMAGES)
        return split_interleaved(texts, text_ids, image_seq_length, max_length, most)

    def _place(self, found: Found, reference: Any) -> Place | None:
        if isinstance(reference, dict):
            return None
        if reference.startswith(("http://", "https://")):
            raise SampleError("image_is_url", f"{reference} has to be downloaded first")
        own = None if self._tar is None else self._member(found.position, reference)
        if own is None and self._tar is not None and not self._recipe["images"]:
            raise SampleError("missing_image", f"there is no member {reference}")
        return own or self._images.find(reference)

    def _member(self, key: str, reference: str) -> Place | None:
        for name in map(split_member_name, _member_names(key, reference)):
            found = self._tar.get(name[0], {}).get(name[1]) if name else None
            if found is None:
                continue
            if not 0 < found[1] <= MAX_IMAGE_BYTES:
                raise SampleError("image_too_large" if found[1] else "empty_image", f"{reference}: {found[1]} bytes")
            return Place(OWN_TAR, *found)
        return None


def _find_in_tar(path: str, samples: list[Sample]) -> Iterator[Found]:
    """The samples that have a json; the others are images of theirs."""
    with open(path, "rb", buffering=0) as file:
        for sample in samples:
            if JSON not in sample.members:
                continue
            place = sample.members[JSON]
            try:
                record = _read_tar_record(file.fileno(), sample.key, *place)
            except SampleError as error:
                record = error
            yield Found((JSON, *place), record, sample.key)


def _read_tar_record(tar: int, key: str, offset: int, size: int) -> Any:
    if size > MAX_DOCUMENT_BYTES:
        raise SampleError("record_too_large", f"{key}.{JSON} has {size:,} bytes")
    try:
        return json.loads(read_member(tar, f"{key}.{JSON}", offset, size))
    except SampleError:
        raise
    except (ValueError, RecursionError) as error:
        raise SampleError("invalid_json", f"{key}.{JSON}: {error}") from error


def _member_names(key: str, reference: str) -> list[str]:
    """What an image may be called in the tar: `KEY.` before its name, in the sample's folder, or as it is."""
    return [f"{key}.{reference}", posixpath.join(posixpath.dirname(key), reference), reference]
