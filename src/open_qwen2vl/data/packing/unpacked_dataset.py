"""Conversations one by one: the rows of a Hugging Face data set as items that the collator takes like packs of one.

    {"messages" | "conversations", "images" | "image"} ──► messages, images ──► ids, labels, media of one document

For sets that are too small to be worth a plan. Order, labels and loss are those of packs of one conversation each.
"""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import Dataset

from ...families import document_processor
from ...families.boxes import write_boxes
from ...families.interface import Media
from ...processing.conversation_records import read_conversation
from ...processing.images import read_image_size
from ...processing.media_records import Video
from ...processing.sample_error import SampleError
from ..documents.forms import TURNS, as_messages, conversation_format, is_turns
from ..documents.items import ReadDocument, finish_document, pack_item
from ..storage.row_values import row_values
from ..storage.tables import COLUMNS, TEXT_COLUMNS
from ..storage.tars import most_media_bytes

logger = logging.getLogger(__name__)


class UnpackedConversations(Dataset):
    """The conversations of a data set, read and decoded when they are asked for.

    An item is that of [`PackedDataset`] with one document. A row that cannot be used (its image is broken, its roles
    are out of order, it is too long, ...) is an item without any and counted in `dropped`.

    Args:
        dataset (`datasets.Dataset`): with `messages` or `conversations`, and `images` or `image` where there are any.
        processor (`ProcessorMixin`): of a family of `families/`; its chat template needs `{% generation %}` marks.
        max_length (`int`, *optional*): longest conversation, in tokens; any length where not given.
        image_seq_length (`int`, *optional*): tokens per image of Open-Qwen2VL; the processor's where not given.
        image_folder (`str` or `os.PathLike`, *optional*): where images that are named by a path lie, and nowhere else.
            Without it paths are taken as they are.
        chat_template (`str`, *optional*): name of one of the processor's chat templates.

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
        chat_template: str | None = None,
    ):
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(
                f"a {type(dataset).__name__} has no order by index, which a run resumes by: load it whole"
            )
        names = [name for name in (*COLUMNS, TURNS) if name in dataset.column_names]
        turns = dataset.select_columns([TURNS])[:1][TURNS] if TURNS in names else []
        if not set(TEXT_COLUMNS) & set(names) and not any(map(is_turns, turns)):
            raise ValueError(f"no column {' or '.join(TEXT_COLUMNS)} among {', '.join(dataset.column_names)}")
        # Arrow rows hold the files of the images as they are: decoding is left to the one place that does it.
        self.rows = dataset.select_columns(names).with_format("arrow")
        self.image_folder = None if image_folder is None else os.path.realpath(image_folder)
        self.processor = processor
        self.max_length = max_length
        self.documents = document_processor(processor, chat_template=chat_template, image_seq_length=image_seq_length)
        self._format = conversation_format(self.documents)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells a run on these data from one on others."""
        return {
            "conversations": len(self),
            "columns": sorted(self.rows.column_names),
            "max_length": self.max_length,
            "vision": self.documents.fingerprint(),
            "chat_template": self._format.fingerprint,
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        dropped: Counter = Counter()
        places: dict[str, str] = {}
        read = []
        try:
            read.append(self._read(index))
        except SampleError as error:
            logger.warning("dropped row %s: %s (%s)", index, error.reason, error)
            dropped[error.reason] = 1
            places = {error.reason: f"row {index} ({error})"}
        return {**pack_item(self.documents, read, dropped), "dropped_places": places, "pack": index}

    def describe(self, index: int) -> dict[str, Any]:
        """What an item is, for messages, as `PackMixture.describe` gives it."""
        return {"source": "conversations", "pack": index, "documents": [("row", str(index))]}

    def _read(self, index: int) -> ReadDocument:
        messages, images, tools = read_conversation(as_messages(row_values(self.rows[index])[0]))
        files = [self._image_file(image) for image in images]
        media = [self._media(reference, file) for reference, file in zip(images, files, strict=True)]
        blocks = [self.documents.placeholder_ids(one) for one in media]
        messages = write_boxes(self._format.plain(messages, tools), media, self.documents.boxes)
        input_ids, labels = self._format.document(messages, blocks)
        if self.max_length is not None and len(input_ids) > self.max_length:
            raise SampleError("too_long", f"{len(input_ids)} tokens are above max_length={self.max_length}")
        tensors = [self.documents.read_media(*one) for one in zip(files, media, strict=True)]
        return finish_document(self.documents, input_ids, labels, media, tensors)

    def _media(self, reference: Any, file: bytes) -> Media:
        if isinstance(reference, Video):
            return self.documents.describe_video(lambda limit: file[:limit])[0]
        return Media("image", *(read_image_size(file, upright=True) if self.documents.needs_sizes else (0, 0)))

    def _image_file(self, image: Any) -> bytes:
        """The bytes of an image or video, from what stands in a row: a path, or a struct with `bytes` or a path."""
        image = image.file if isinstance(image, Video) else image
        if isinstance(image, dict):
            if image.get("bytes"):
                return image["bytes"]
            image = image.get("path")
        if not image:
            raise SampleError("missing_image", "the row has neither the bytes of an image nor a path")
        try:
            path = Path(image)
            if self.image_folder is not None:
                path = Path(os.path.realpath(os.path.join(self.image_folder, image)))
                if not path.is_relative_to(self.image_folder):
                    raise SampleError("unsafe_image_path", f"{image} is not inside of {self.image_folder}")
            if path.exists() and not path.is_file():
                raise SampleError("missing_image", f"{path} is no regular file")
            if path.stat().st_size > most_media_bytes(path.name):
                raise SampleError("image_too_large", f"{path} is larger than {most_media_bytes(path.name)} bytes")
            return path.read_bytes()
        except SampleError:
            raise
        except (OSError, ValueError) as error:  # ValueError: names with NUL
            raise SampleError("missing_image", f"{image}: {error}") from error
