"""What a caption sample is (`key.jpg`, `key.txt`, perhaps `key.json`) and how it becomes a document of the plan."""

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...processing.sample_error import SampleError
from ...processing.text_formats import caption_document, caption_document_length, tokenize_captions
from ..engine.engine import collection_paused
from ..packing.plan_files import Document, Group, GroupDocuments, shard_path
from ..storage.open_files import Newest, read_pixels
from ..storage.tar_index import read_shard_index
from ..storage.tars import IMAGE_EXTENSIONS, Sample, ShardIndex, index_shard, read_json, read_member, sample_uid

logger = logging.getLogger(__name__)


@collection_paused()
def caption_documents(group: Group, tokenizer: PreTrainedTokenizerBase) -> GroupDocuments:
    """Plan the documents of some tars: no image is read.

    Args:
        group ([`Group`]): the tars.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.

    Returns:
        [`GroupDocuments`]: each sample of the tars is either a document or named with a reason.

    Raises:
        OSError: if a tar cannot be read.
    """
    documents, skipped, ignored = [], [], 0
    for number, shard in zip(group.shards, group.recipe["shards"], strict=True):
        found = _tar_documents(shard_path(group.folder, shard), number, tokenizer, group.recipe)
        documents += found.documents
        skipped += [(shard["path"], key, reason) for key, reason in found.skipped]
        ignored += found.ignored_members
    return GroupDocuments(documents, skipped, ignored)


class CaptionReader:
    """Reads the captions of a plan, for one process.

    Args:
        folder (`Path`): folder of the plan.
        plan (`dict`): its content.
        processor (`OpenQwen2VLProcessor`): tokenizes and resizes.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], processor: Any):
        self._image_seq_length = plan["image_seq_length"]
        self._processor = processor
        self._tars = Newest(lambda shard: open(shard_path(folder, plan["shards"][shard]), "rb", buffering=0))

    def read(self, document: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """Read a document.

        Args:
            document (`dict`): of a row of the plan.

        Returns:
            `tuple`: int64 `input_ids` and `labels` of shape `(S,)`, uint8 `pixel_values` of shape `(1, 3, H, W)`.

        Raises:
            SampleError: if a member has moved or cannot be used, each with a `reason`.
        """
        tar = self._tars[document["shard"]].fileno()
        image, text = (
            read_member(tar, f"{document['key']}.{member['ext']}", member["offset"], member["size"])
            for member in document["members"]
        )
        tokenizer = self._processor.tokenizer
        (text_ids,) = tokenize_captions(tokenizer, [decode_caption(text)])
        return *caption_document(text_ids, tokenizer, self._image_seq_length), read_pixels(image, self._processor)


def decode_caption(data: bytes) -> str:
    """The caption in a text member, unchanged.

    Args:
        data (`bytes`): the member's data.

    Returns:
        `str`: the text.

    Raises:
        SampleError: `bad_caption_encoding` if it is not UTF-8, `empty_caption` if it is white space only.
    """
    try:
        caption = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError("bad_caption_encoding", str(error)) from error
    if not caption.strip():
        raise SampleError("empty_caption", "the caption is empty")
    return caption


def caption_members(file: int, sample: Sample) -> tuple[list[tuple[str, int, int]], str]:
    """Where a caption sample's image and text are, and the text.

    Args:
        file (`int`): descriptor of the open tar.
        sample ([`Sample`]): from its index.

    Returns:
        `tuple`: extension, byte offset and size of the image and of the text, and the caption.

    Raises:
        SampleError: `missing_image`, `missing_caption`, `empty_image`, or as [`decode_caption`] and [`read_member`].
    """
    image_ext = next((ext for ext in IMAGE_EXTENSIONS if ext in sample.members), None)
    if image_ext is None:
        raise SampleError("missing_image", f"{sample.key} has no member {', '.join(IMAGE_EXTENSIONS)}")
    if "txt" not in sample.members:
        raise SampleError("missing_caption", f"{sample.key} has no member txt")
    if sample.members[image_ext][1] == 0:
        raise SampleError("empty_image", f"{sample.key}.{image_ext} has no bytes")
    caption = decode_caption(read_member(file, f"{sample.key}.txt", *sample.members["txt"]))
    return [(ext, *sample.members[ext]) for ext in (image_ext, "txt")], caption


class _TarDocuments(NamedTuple):
    documents: list[Document]
    skipped: list[tuple[str, str]]  # key and reason
    ignored_members: int


def _tar_documents(
    path: str, number: int, tokenizer: PreTrainedTokenizerBase, recipe: dict[str, Any]
) -> _TarDocuments:
    indexed = read_shard_index(path)
    found = _read_captions(path, *indexed) if indexed else None
    if found and any(reason == "moved_member" for _, reason in found.skipped):
        logger.warning("%s: its index is that of another tar: not used", path)
        found = None
    index = ShardIndex() if found else index_shard(path)
    readable, captions, unusable = found or _read_captions(path, index.samples)
    skipped = index.skipped + unusable
    documents = []
    for (key, uid, members), ids in zip(readable, tokenize_captions(tokenizer, captions), strict=True):
        tokens = caption_document_length(len(ids), recipe["image_seq_length"])
        if tokens > recipe["max_length"]:
            skipped.append((key, "too_long"))
        else:
            documents.append(Document(number, key, uid, members, tokens))
    return _TarDocuments(documents, skipped, index.ignored_members)


class _Captions(NamedTuple):
    readable: list[tuple[str, str, list[tuple[str, int, int]]]]  # key, uid, members
    texts: list[str]
    skipped: list[tuple[str, str]]  # key and reason


def _read_captions(path: str, samples: list[Sample], uids: list[str] | None = None) -> _Captions:
    """Read the texts of some samples, and their uids from their metadata where they are not given."""
    found = _Captions([], [], [])
    with open(path, "rb", buffering=0) as file:
        for number, sample in enumerate(samples):
            try:
                members, caption = caption_members(file.fileno(), sample)
            except SampleError as error:
                found.skipped.append((sample.key, error.reason))
                continue
            uid = uids[number] if uids else _uid(file.fileno(), path, sample)
            found.readable.append((sample.key, uid, members))
            found.texts.append(caption)
    return found


def _uid(file: int, path: str, sample: Sample) -> str:
    return sample_uid(read_json(file, sample), os.path.basename(path), sample.key)
