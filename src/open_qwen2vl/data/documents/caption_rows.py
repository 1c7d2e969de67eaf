"""Captions in tables: rows of an image and its text, as Hugging Face data sets have them.

The image is a struct of bytes and path, or a path that is looked up in --images. What becomes of it is a caption
document like that of a tar (captions.py); planning reads the texts alone.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...processing.sample_error import SampleError
from ...processing.text_formats import caption_document, caption_document_length, tokenize_captions
from ..packing.plan_files import Document, Group, GroupDocuments, shard_path
from ..storage.image_files import ImageFiles
from ..storage.open_files import read_pixels
from ..storage.tables import Columns, column_names
from ..storage.tars import sample_uid
from .records import RecordReader, find_records, place_image, read_image

IMAGE_COLUMN = "image"
CAPTION_COLUMNS = ("caption", "text")  # where none is named, the first that a table has


def find_caption_column(names: Sequence[str], wanted: str | None = None) -> str | None:
    """Which column of a table has its captions.

    Args:
        names (`Sequence[str]`): the table's columns.
        wanted (`str`, *optional*): the one that the user named.

    Returns:
        `str`: its name; `None` if there is none, or no column `image`.
    """
    if IMAGE_COLUMN not in names:
        return None
    return next((name for name in ((wanted,) if wanted else CAPTION_COLUMNS) if name in names), None)


def common_caption_column(paths: Sequence[str | os.PathLike], wanted: str | None = None) -> str:
    """The column of the captions in several tables.

    Args:
        paths (`Sequence[str | os.PathLike]`): tables that each have such a column.
        wanted (`str`, *optional*): the one that the user named.

    Returns:
        `str`: its name.

    Raises:
        ValueError: if they do not have it in common.
    """
    found = {find_caption_column(column_names(path), wanted): path for path in paths}
    if len(found) > 1:
        raise ValueError(f"captions are in the columns {' and '.join(map(str, found))} of different files: name one "
                         f"(--caption-column), or plan {' and '.join(map(str, found.values()))} apart")  # fmt: skip
    return next(iter(found))


def caption_row_documents(group: Group, tokenizer: PreTrainedTokenizerBase) -> GroupDocuments:
    """Plan the captions of a part of a table: no image is read.

    Args:
        group ([`Group`]): one file and a range of its rows.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.

    Returns:
        [`GroupDocuments`]: each row is either a document or named with a reason.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a row names an image and there is no place to look for images.
    """
    recipe = group.recipe
    images = ImageFiles(group.folder, recipe["images"])
    (shard,), (number,) = recipe["shards"], group.shards
    path = shard_path(group.folder, shard)
    readable, captions, skipped = [], [], []
    for found in find_records(path, *recipe["range"], _columns(recipe)):
        try:
            caption = _caption(found.record, recipe["caption_column"])
            place = place_image(_image(found.record), images)
        except SampleError as error:
            skipped.append((shard["path"], found.key, error.reason))
            continue
        captions.append(caption)
        readable.append((found, place))
    documents = []
    for (found, place), ids in zip(readable, tokenize_captions(tokenizer, captions), strict=True):
        tokens = caption_document_length(len(ids), recipe["image_seq_length"])
        if tokens > recipe["max_length"]:
            skipped.append((shard["path"], found.key, "too_long"))
            continue
        uid = sample_uid(found.record, os.path.basename(path), found.position)
        documents.append(Document(number, found.key, uid, [found.place], tokens, [place]))
    return GroupDocuments(documents, skipped, 0)


class CaptionRowReader:
    """Reads the captions of a plan that was made from tables, for one process.

    Args:
        folder (`Path`): folder of the plan.
        plan (`dict`): its content.
        processor (`OpenQwen2VLProcessor`): tokenizes and resizes.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], processor: Any):
        self._caption_column = plan["caption_column"]
        self._image_seq_length = plan["image_seq_length"]
        self._processor = processor
        self._images = ImageFiles(folder, plan["images"])
        self._records = RecordReader([shard_path(folder, shard) for shard in plan["shards"]], _columns(plan))

    def read(self, document: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """Read a document.

        Args:
            document (`dict`): of a row of the plan.

        Returns:
            `tuple`: int64 `input_ids` and `labels` of shape `(S,)`, uint8 `pixel_values` of shape `(1, 3, H, W)`.

        Raises:
            SampleError: if the caption or its image cannot be used, each with a `reason`.
        """
        row, (place,) = self._records.read(document), document["images"]
        tokenizer = self._processor.tokenizer
        (text_ids,) = tokenize_captions(tokenizer, [_caption(row, self._caption_column)])
        image = read_image(_image(row), place, self._images)
        return *caption_document(text_ids, tokenizer, self._image_seq_length), read_pixels(image, self._processor)


def _columns(recipe: dict[str, Any]) -> Columns:
    return Columns((recipe["caption_column"], "id", "uid"), (IMAGE_COLUMN,))


def _caption(row: dict[str, Any], column: str) -> str:
    caption = row[column]
    if caption is None:
        raise SampleError("missing_caption", f"{column} is null")
    if not isinstance(caption, str):
        raise SampleError("bad_caption", f"{column} is a {type(caption).__name__}")
    if not caption.strip():
        raise SampleError("empty_caption", "the caption is empty")
    return caption


def _image(row: dict[str, Any]) -> Any:
    image = row[IMAGE_COLUMN]
    path = image.get("path") if isinstance(image, dict) else image
    if isinstance(image, dict) and image.get("bytes") is not None or isinstance(path, str) and path:
        return image
    raise SampleError("missing_image" if image is None else "bad_image", "neither the bytes of an image nor a path")
