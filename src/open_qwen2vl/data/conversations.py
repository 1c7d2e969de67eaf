"""Conversations as documents of a plan: planned group by group, read one by one.

    json, jsonl   record ─ json_records.py        ┐ read_conversation ─► messages ─► ids, labels
    parquet, ...  row ─ table_rows.py             ┘                    └► images ─► image_files.py, or the row's bytes

To plan one its text is tokenised and its images are looked up, but none is opened. A record that cannot be trained on
is left out by the name of a reason, with its id; one whose image turns out to be broken is left out when it is read.
"""

import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..processing.conversation_records import ConversationError, read_conversation
from ..processing.conversations import ConversationFormat, training_chat_template
from .image_files import ImageFiles, Place
from .json_records import RecordError, read_record, record_spans
from .plan_files import Document, Group, GroupDocuments, shard_path
from .reading import Newest, read_pixels
from .shards import MemberError, sample_uid
from .table_rows import RowTable

BATCHES = 8  # decoded batches of tables that one process keeps
RECORD, ROW = "record", "row"  # what stands in place of an extension in a document's only member


class _Found(NamedTuple):
    place: tuple[str, int, int]
    record: Any  # parsed, or the error that it could not be
    position: str  # names a record that has no id


def conversation_documents(group: Group, tokenizer: PreTrainedTokenizerBase) -> GroupDocuments:
    """Plan the conversations of a part of one file: no image is read.

    Args:
        group ([`Group`]): one file and a range of its bytes (JSON) or rows (tables).
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.

    Returns:
        [`GroupDocuments`]: each record is either a document or named with a reason.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a record names an image and there is no place to look for images.
    """
    chat = ConversationFormat(tokenizer, training_chat_template(tokenizer))
    if chat.fingerprint != group.recipe["chat_template"]:
        raise ValueError("the tokenizer has another chat template after save_pretrained; use num_workers 1")
    images = ImageFiles(group.folder, group.recipe["images"])
    (shard,), (number,) = group.recipe["shards"], group.shards
    path = shard_path(group.folder, shard)
    documents, skipped = [], []
    for found in _find(path, *group.recipe["range"]):
        key = _key(found)
        try:
            if isinstance(found.record, RecordError):
                raise found.record
            messages, references = read_conversation(found.record)
            places = [_place(reference, images) for reference in references]
            tokens = len(chat.document(messages, group.recipe["image_seq_length"])[0])
            if tokens > group.recipe["max_length"]:
                raise ConversationError("too_long", f"{tokens} tokens")
        except (RecordError, ConversationError, MemberError) as error:
            skipped.append((shard["path"], key, error.reason))
            continue
        uid = sample_uid(None, os.path.basename(path), found.position)
        documents.append(Document(number, key, uid, [found.place], tokens, places))
    return GroupDocuments(documents, skipped, 0)


class ConversationReader:
    """Reads the conversations of a plan, for one process.

    Args:
        folder (`Path`): folder of the plan.
        plan (`dict`): its content.
        processor (`OpenQwen2VLProcessor`): tokenizes, lays out and resizes.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], processor: Any):
        paths = [shard_path(folder, shard) for shard in plan["shards"]]
        self._image_seq_length = plan["image_seq_length"]
        self._processor = processor
        self._chat = ConversationFormat(processor.tokenizer, processor.chat_template)
        self._images = ImageFiles(folder, plan["images"])
        self._files = Newest(lambda shard: open(paths[shard], "rb", buffering=0))
        self._tables = Newest(lambda shard: RowTable(paths[shard]))
        self._batch = lru_cache(BATCHES)(lambda shard, batch: self._tables[shard].read_batch(batch))

    def read(self, document: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """Read a document.

        Args:
            document (`dict`): of a row of the plan.

        Returns:
            `tuple`: int64 `input_ids` and `labels` of shape `(S,)`, uint8 `pixel_values` of shape `(images, 3, H, W)`.

        Raises:
            RecordError, ConversationError, MemberError, ImageError: if the record or one of its images cannot be used
                any more, each with a `reason`.
        """
        messages, references = read_conversation(self._record(document))
        if len(references) != len(document["images"]):
            raise ConversationError("changed_conversation", f"{len(references)} images, not as planned")
        input_ids, labels = self._chat.document(messages, self._image_seq_length)
        files = map(self._image, references, document["images"])
        pixels = [read_pixels(data, self._processor) for data in files]
        return input_ids, labels, torch.cat(pixels) if pixels else self._processor.resize_images([])

    def _record(self, document: dict[str, Any]) -> Any:
        (member,) = document["members"]
        if member["ext"] == ROW:
            batch, row = self._tables[document["shard"]].find(member["offset"])
            return self._batch(document["shard"], batch).slice(row, 1).to_pylist()[0]
        return read_record(self._files[document["shard"]].fileno(), member["offset"], member["size"])

    def _image(self, reference: Any, place: dict[str, int] | None) -> bytes:
        if place is not None:
            return self._images.read(_name(reference), (place["root"], place["offset"], place["size"]))
        content = reference.get("bytes") if isinstance(reference, dict) else None
        if not content:
            raise MemberError("missing_image", "the row has no bytes of an image")
        return content


def _find(path: str, start: int, stop: int) -> Iterator[_Found]:
    """The records of a range with their places."""
    if path.endswith((".json", ".jsonl")):
        yield from _find_in_json(path, record_spans(path, start, stop))
        return
    table = RowTable(path)
    yield from (_Found((ROW, number, 0), row, f"row {number}") for number, row in table.rows_to_plan(start, stop))
    table.close()


def _find_in_json(path: str, spans: Iterable[tuple[int, int]]) -> Iterator[_Found]:
    with open(path, "rb", buffering=0) as file:
        for offset, size in spans:
            try:
                record = read_record(file.fileno(), offset, size)
            except RecordError as error:
                record = error
            if record is not None:  # a blank line is no record
                yield _Found((RECORD, offset, size), record, f"byte {offset}")


def _key(found: _Found) -> str:
    name = found.record.get("id") if isinstance(found.record, dict) else None
    key = str(name) if isinstance(name, str | int) and name != "" else found.position
    return key.encode(errors="backslashreplace").decode()


def _place(reference: Any, images: ImageFiles) -> Place | None:
    """Where an image is; None if its bytes stand in the record."""
    if isinstance(reference, dict) and reference.get("bytes") is not None:
        return None
    return images.find(_name(reference))


def _name(reference: Any) -> str:
    return reference["path"] if isinstance(reference, dict) else reference
