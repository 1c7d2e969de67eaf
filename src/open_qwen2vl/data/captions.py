"""What a caption sample is (`key.jpg`, `key.txt`, perhaps `key.json`) and how it becomes a document of the plan."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..processing.text_formats import caption_document_length, tokenize_captions
from .plan_files import Document
from .shards import IMAGE_EXTENSIONS, MemberError, Sample, index_shard, read_member, sample_uid


class ShardDocuments(NamedTuple):
    """The documents of a tar and what was left out.

    Attributes:
        documents (`list[Document]`): in the order of the tar.
        skipped (`list[tuple[str, str]]`): key and reason.
        ignored_members (`int`): members that belong to no sample, as directories.
    """

    documents: list[Document]
    skipped: list[tuple[str, str]]
    ignored_members: int


def caption_documents(
    path: str | Path, shard: int, tokenizer: PreTrainedTokenizerBase, image_seq_length: int, max_length: int
) -> ShardDocuments:
    """Plan the documents of one tar: no image is read.

    Args:
        path (`str | Path`): the tar.
        shard (`int`): its index in the plan's list.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        image_seq_length (`int`): tokens per image.
        max_length (`int`): positions that a document may take.

    Returns:
        [`ShardDocuments`]: each sample of the tar is either a document or named with a reason.

    Raises:
        OSError: if the tar cannot be read.
    """
    index = index_shard(path)
    readable, captions, skipped = [], [], list(index.skipped)
    with open(path, "rb", buffering=0) as file:
        for sample in index.samples:
            try:
                members, caption = _caption_members(file.fileno(), sample)
            except MemberError as error:
                skipped.append((sample.key, error.reason))
                continue
            uid = sample_uid(_read_json(file.fileno(), sample), os.path.basename(path), sample.key)
            readable.append((sample.key, uid, members))
            captions.append(caption)
    documents = []
    for (key, uid, members), ids in zip(readable, tokenize_captions(tokenizer, captions), strict=True):
        tokens = caption_document_length(len(ids), image_seq_length)
        if tokens > max_length:
            skipped.append((key, "too_long"))
        else:
            documents.append(Document(shard, key, uid, members, tokens))
    return ShardDocuments(documents, skipped, index.ignored_members)


def decode_caption(data: bytes) -> str:
    """The caption in a text member, unchanged.

    Args:
        data (`bytes`): the member's data.

    Returns:
        `str`: the text.

    Raises:
        MemberError: `bad_caption_encoding` if it is not UTF-8, `empty_caption` if it is white space only.
    """
    try:
        caption = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MemberError("bad_caption_encoding", str(error)) from error
    if not caption.strip():
        raise MemberError("empty_caption", "the caption is empty")
    return caption


def _caption_members(file: int, sample: Sample) -> tuple[list[tuple[str, int, int]], str]:
    image_ext = next((ext for ext in IMAGE_EXTENSIONS if ext in sample.members), None)
    if image_ext is None:
        raise MemberError("missing_image", f"{sample.key} has no member {', '.join(IMAGE_EXTENSIONS)}")
    if "txt" not in sample.members:
        raise MemberError("missing_caption", f"{sample.key} has no member txt")
    if sample.members[image_ext][1] == 0:
        raise MemberError("empty_image", f"{sample.key}.{image_ext} has no bytes")
    caption = decode_caption(read_member(file, f"{sample.key}.txt", *sample.members["txt"]))
    return [(ext, *sample.members[ext]) for ext in (image_ext, "txt")], caption


def _read_json(file: int, sample: Sample) -> Any:
    """The sample's metadata; `None` where it has none that can be read, which costs it nothing but its uid."""
    if "json" not in sample.members:
        return None
    try:
        return json.loads(read_member(file, f"{sample.key}.json", *sample.members["json"]))
    except (ValueError, RecursionError):
        return None
