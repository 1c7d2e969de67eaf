"""Open-Qwen2VL's documents laid out one by one, as tests compare them with what is planned and read."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from open_qwen2vl.data.documents.forms import conversation_format
from open_qwen2vl.families.interface import Media
from open_qwen2vl.families.open_qwen2vl import OpenQwen2VLDocuments
from open_qwen2vl.processing.text_formats import encode_as_text, split_document, text_document, text_parts

IMAGE = Media("image")


def plan_rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of all `"part"`s of a plan, or of all lists of what is `"skipped"`."""
    read = (lambda path: pa.ipc.open_file(path).read_all()) if kind == "part" else pq.read_table
    return [row for path in sorted(Path(folder).glob(f"{kind}-*")) for row in read(str(path)).to_pylist()]


def tokenize_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str | None]) -> list[list[int]]:
    """Ids of each entry."""
    return encode_as_text(tokenizer, text_parts(texts, OpenQwen2VLDocuments(tokenizer).text_format))


def interleaved_document(
    texts: list[str | None], tokenizer: PreTrainedTokenizerBase, image_seq_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of texts with None where an image stands."""
    family = OpenQwen2VLDocuments(tokenizer, image_seq_length=image_seq_length)
    blocks = [family.placeholder_ids(IMAGE)] * texts.count(None)
    return text_document(texts, blocks, tokenizer, family.text_format)


def caption_document(
    caption: str, tokenizer: PreTrainedTokenizerBase, image_seq_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of a caption; with 0 tokens an image without any."""
    return interleaved_document([None, caption], tokenizer, image_seq_length)


def split_texts(
    texts: list[str | None], tokenizer: PreTrainedTokenizerBase, image_seq_length: int, max_length: int, *most: int
) -> list[tuple[int, int, int]]:
    """The pieces of a document: first entry, one behind the last, positions."""
    lengths = list(map(len, tokenize_texts(tokenizer, texts)))
    text_format = OpenQwen2VLDocuments(tokenizer).text_format
    return split_document(texts, lengths, [image_seq_length] * texts.count(None), text_format, max_length, *most)


def conversation_document(
    messages: list[dict[str, Any]], processor: Any, image_seq_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of a conversation in the normal form, or with text as content, by the processor's template."""
    family = OpenQwen2VLDocuments(processor, image_seq_length=image_seq_length)
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    images = sum(part["type"] == "image" for content in contents for part in content)
    return conversation_format(family).document(messages, [family.placeholder_ids(IMAGE)] * images)
