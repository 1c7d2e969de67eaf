"""Conversations as documents of a plan: planned group by group, read one by one.

    record ─ records.py ─► read_conversation ─► messages ─► ids, labels
                                             └► images ─► image_files.py, or the row's bytes

To plan one its text is tokenised and its images are looked up, but none is opened. A record that cannot be trained on
is left out by the name of a reason, with its id; one whose image turns out to be broken is left out when it is read.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...processing.conversation_records import read_conversation
from ...processing.conversations import ConversationFormat, training_chat_template
from ...processing.sample_error import SampleError
from ..packing.plan_files import Document, Group, GroupDocuments, shard_path
from ..storage.image_files import ImageFiles
from ..storage.open_files import read_pixels
from ..storage.tables import CONVERSATION_COLUMNS
from ..storage.tars import sample_uid
from .records import RecordReader, find_records, place_image, read_image


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
    for found in find_records(path, *group.recipe["range"], CONVERSATION_COLUMNS):
        try:
            if isinstance(found.record, SampleError):
                raise found.record
            messages, references = read_conversation(found.record)
            places = [place_image(reference, images) for reference in references]
            tokens = len(chat.document(messages, group.recipe["image_seq_length"])[0])
            if tokens > group.recipe["max_length"]:
                raise SampleError("too_long", f"{tokens} tokens")
        except SampleError as error:
            skipped.append((shard["path"], found.key, error.reason))
            continue
        uid = sample_uid(None, os.path.basename(path), found.position)
        documents.append(Document(number, found.key, uid, [found.place], tokens, places))
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
        self._records = RecordReader(paths, CONVERSATION_COLUMNS)

    def read(self, document: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """Read a document.

        Args:
            document (`dict`): of a row of the plan.

        Returns:
            `tuple`: int64 `input_ids` and `labels` of shape `(S,)`, uint8 `pixel_values` of shape `(images, 3, H, W)`.

        Raises:
            SampleError: if the record or one of its images cannot be used
                any more, each with a `reason`.
        """
        messages, references = read_conversation(self._records.read(document))
        if len(references) != len(document["images"]):
            raise SampleError("changed_conversation", f"{len(references)} images, not as planned")
        input_ids, labels = self._chat.document(messages, self._image_seq_length)
        pixels = [
            read_pixels(read_image(reference, place, self._images), self._processor)
            for reference, place in zip(references, document["images"], strict=True)
        ]
        return input_ids, labels, torch.cat(pixels) if pixels else self._processor.resize_images([])
