"""Conversations one by one: the rows of a Hugging Face data set as items that the collator takes like packs of one.

    {"messages" | "conversations", "images" | "image"} ──► messages, images ──► ids, labels, pixels of one document

For sets that are too small to be worth a plan. Order, labels and loss are those of packs of one conversation each.
"""

import logging
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from ...processing.conversation_records import read_conversation
from ...processing.conversations import ConversationFormat
from ...processing.sample_error import SampleError
from ..storage.open_files import read_pixels
from ..storage.tables import COLUMNS, TEXT_COLUMNS

logger = logging.getLogger(__name__)


class UnpackedConversations(Dataset):
    """The conversations of a data set, read and decoded when they are asked for.

    An item is that of [`PackedDataset`] with one document. A row that cannot be used (its image is broken, its roles
    are out of order, it is too long, ...) is an item without any and counted in `dropped`.

    Args:
        dataset (`datasets.Dataset`): with `messages` or `conversations`, and `images` or `image` where there are any.
        processor (`OpenQwen2VLProcessor`): its chat template needs `{% generation %}` marks.
        max_length (`int`, *optional*): longest conversation, in tokens; any length where not given.
        image_seq_length (`int`, *optional*): tokens per image; the processor's where not given.
        image_folder (`str` or `os.PathLike`, *optional*): where images that are named by a path lie, and nowhere else.
            Without it paths are taken as they are.

    Raises:
        ValueError: for a data set that holds no conversations, or cannot be read by index.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        processor: Any,
        max_length: int | None = None,
        image_seq_length: int | None = None,
        image_folder: str | os.PathLike | None = None,
    ):
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(
                f"a {type(dataset).__name__} has no order by index, which a run resumes by: load it whole"
            )
        names = [name for name in COLUMNS if name in dataset.column_names]
        if not set(TEXT_COLUMNS) & set(names):
            raise ValueError(f"no column {' or '.join(TEXT_COLUMNS)} among {', '.join(dataset.column_names)}")
        # Arrow rows hold the files of the images as they are: decoding is left to the one place that does it.
        self.rows = dataset.select_columns(names).with_format("arrow")
        self.image_folder = None if image_folder is None else os.path.realpath(image_folder)
        self.processor = processor
        self.max_length = max_length
        self.image_seq_length = processor.image_seq_length if image_seq_length is None else image_seq_length
        self._format = ConversationFormat(processor.tokenizer, processor.chat_template)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells a run on these data from one on others."""
        return {
            "conversations": len(self),
            "columns": sorted(self.rows.column_names),
            "max_length": self.max_length,
            "image_seq_length": self.image_seq_length,
            "chat_template": self._format.fingerprint,
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        dropped: dict[str, int] = {}
        try:
            input_ids, labels, pixel_values = self._read(index)
        except SampleError as error:
            logger.warning("dropped row %s: %s (%s)", index, error.reason, error)
            dropped[error.reason] = 1
            input_ids = labels = np.empty(0, np.int64)
            pixel_values = self.processor.resize_images([])
        return {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.arange(len(input_ids)),
            "labels": torch.from_numpy(labels),
            "pixel_values": pixel_values,
            "image_seq_length": self.image_seq_length,
            "dropped": dropped,
            "pack": index,
        }

    def describe(self, index: int) -> dict[str, Any]:
        """What an item is, for messages.

        Args:
            index (`int`): its number.

        Returns:
            `dict`: as `PackMixture.describe` gives it.
        """
        return {"source": "conversations", "pack": index, "documents": [("row", str(index))]}

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        messages, images = read_conversation(self.rows[index].to_pylist()[0])
        input_ids, labels = self._format.document(messages, self.image_seq_length)
        if self.max_length is not None and len(input_ids) > self.max_length:
            raise SampleError("too_long", f"{len(input_ids)} tokens are above max_length={self.max_length}")
        pixels = [read_pixels(self._image_file(image), self.processor) for image in images]
        return input_ids, labels, torch.cat([self.processor.resize_images([]), *pixels])

    def _image_file(self, image: Any) -> bytes:
        """The bytes of an image, from what stands in a row: a path, or a struct with `bytes` or a path."""
        if isinstance(image, dict):
            if image.get("bytes"):
                return image["bytes"]
            image = image["path"]
        path = Path(image)
        if self.image_folder is not None:
            path = Path(os.path.realpath(os.path.join(self.image_folder, image)))
            if not path.is_relative_to(self.image_folder):
                raise SampleError("unsafe_image_path", f"{image} is not inside of {self.image_folder}")
        try:
            return path.read_bytes()
        except OSError as error:
            raise SampleError("missing_image", str(error)) from error
