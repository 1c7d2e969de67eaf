"""Packs as a map-style dataset: item i is read, decoded and tokenised when it is asked for, in the loader's workers.

    plan.json, part-*.arrow ──► pack i: documents ──► text, images by location (documents.py) ──► tensors of a pack

Map-style, so that a resumed run continues by index. In memory stand only the pack counts of the parts; a process opens
parts and other files when it first needs them and keeps the last few.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ...families import document_processor
from ...families.interface import DocumentProcessor
from ...files import shard_path
from ...places import Place, identities, is_remote, place
from ...processing.sample_error import SampleError
from ...processing.text_formats import tokenizer_fingerprint
from ..documents.documents import RANGES, UNREACHABLE, UNREADABLE, DocumentReader, Remote
from ..documents.forms import conversation_format
from ..documents.items import ReadDocument, pack_item
from ..documents.shared_pictures import rows_by_picture
from ..storage.open_files import Newest
from .plan_files import PACKS_PER_BATCH, Part, part_name, read_figure, read_part_ends, read_part_metadata, read_plan

logger = logging.getLogger(__name__)

BATCHES = 8  # decoded batches of parts that one process keeps


class PackedDataset(Dataset):
    """The packs of a finished plan.

    An item is a dict:

    - `input_ids`, `labels` (-100 at images, at the first token of each document and at all of a conversation but the
      answers): int64 `(S,)`; `position_ids`, from 0 in each document, and from behind the picture again in each
      further conversation on it: int64 `(S,)`, or `(rows, S)` for M-RoPE;
    - the media by the names that the model's forward has for them, first dimension joined: for Open-Qwen2VL
      `pixel_values`, uint8 `(images, 3, H, W)`; for Qwen2-VL images and videos apart;
    - arguments of the forward that are the same for the whole plan: for Open-Qwen2VL `image_seq_length`, an int;
    - `media`, the number of images and videos, and `vision_work`, a [`VisionWork`] of ints;
    - `dropped`: number of documents, by reason, that the plan holds but that could not be read. Such a document is
      left out whole, with all that share a picture with it; `S` is 0 where a pack has no other.

    Args:
        packs_dir (`str | Place`): folder of the plan.
        processor (`ProcessorMixin`): of a family of `families/`; its tokenizer must be the plan's, its sizes of media
            too, and for conversations its chat template.
        files_checked (`bool`, *optional*, defaults to `False`): leave out [`check_files`], which has been called.
        remote (`Remote`, *optional*): how files of a bucket are read.

    Raises:
        ValueError: if the plan is not finished, of another version, made with another tokenizer or chat template, or
            if one of its files is gone or has changed.
    """

    def __init__(self, packs_dir: str | Place, processor: Any, files_checked: bool = False, remote: Remote = RANGES):
        self.folder = place(packs_dir)
        self.processor, self._remote = processor, remote
        self.plan = read_plan(self.folder)
        try:
            self.documents = document_processor(processor, self.plan["vision"], self.plan.get("chat_template_name"))
        except ValueError as error:
            raise ValueError(f"{self.folder} was planned with another processor: {error}") from error
        _check_tokenizer(self.folder, self.plan, processor.tokenizer)
        if "chat_template" in self.plan:
            _check_chat_template(self.folder, self.plan, self.documents)
        if not files_checked:
            check_files(self.folder, self.plan)
        self._ends = read_part_ends(self.folder, self.plan)
        self._files: _OpenFiles | None = None
        self.is_remote = is_remote(shard_path(self.folder, self.plan["shards"][0]))

    @property
    def part_ends(self) -> np.ndarray:
        """Packs of all parts up to each, itself included: int64 `(parts,)`."""
        return self._ends

    def fetch_ahead(self, parts: Iterable[int]) -> None:
        """Have the shards of parts fetched into the cache, if there is one, in the background."""
        if self._remote.cache is None or not self.is_remote:
            return
        for part in parts:
            shards = read_part_metadata(self.folder / part_name(part))["settings"]["shards"]
            self._remote.cache.fetch_ahead((shard_path(self.folder, shard), shard) for shard in shards)

    @property
    def fingerprint(self) -> str:
        """Hash of the plan, the same wherever the plan and its files lie."""
        images = [(os.path.basename(root["path"]), root.get("size")) for root in self.plan["images"]]
        plan = {name: value for name, value in self.plan.items() if name != "shards"}  # they are in its `content`
        return hashlib.sha256(json.dumps({**plan, "images": images}, sort_keys=True).encode()).hexdigest()

    def per_pack(self, column: str) -> np.ndarray:
        """A figure of each pack as planned, `tokens`, `images`, `patches` or `labels`: int32 `(packs,)`."""
        return read_figure(self.folder, self.plan, column)

    def document_names(self, index: int) -> list[tuple[str, str]]:
        """Where the documents of a pack come from: path of the tar or other file and key of the sample, as planned."""
        return [
            (shard_path(self.folder, self.plan["shards"][document["shard"]]), document["key"])
            for document in self._documents(index)
        ]

    def empty_pack(self) -> dict[str, Any]:
        """An item without documents, `S` = 0."""
        return pack_item(self.documents, [], Counter())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        dropped: Counter = Counter()
        places: dict[str, str] = {}
        documents: list[ReadDocument] = []
        rows_of_pack = self._documents(index)
        if self.is_remote:
            self._open_files().reader.read_ahead(rows_of_pack)
        for rows in rows_by_picture(rows_of_pack):
            try:
                documents += self._read(rows)
            except SampleError as error:
                dropped[error.reason] += len(rows)
                file, key = self.plan["shards"][rows[0]["shard"]]["path"], rows[0]["key"]
                key += f" and {len(rows) - 1} on its picture" if len(rows) > 1 else ""
                places.setdefault(error.reason, f"{file}/{key} ({error})")
                logger.warning("dropped %s/%s: %s (%s)", file, key, error.reason, error)
        return {**pack_item(self.documents, documents, dropped), "dropped_places": places}

    def _read(self, rows: list[dict[str, Any]]) -> list[ReadDocument]:
        reader = self._open_files().reader
        try:
            return reader.read(rows)
        except SampleError as error:
            if not self.is_remote or error.reason in (UNREACHABLE, UNREADABLE):
                raise
        # Without TLS nothing checks what comes over a network: what is damaged may be whole the next time.
        reader.read_ahead(rows, again=True)
        return reader.read(rows)

    def _documents(self, index: int) -> list[dict[str, Any]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        index %= len(self)
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._open_files().documents(part, index - (int(self._ends[part - 1]) if part else 0))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}

    def _open_files(self) -> "_OpenFiles":
        # A forked worker must not share file positions with its parent; a spawned one starts without files.
        if self._files is None or self._files.process != os.getpid():
            self._files = _OpenFiles(place(str(self.folder)), self.plan, self.documents, self._remote)
        return self._files


class _OpenFiles:
    """The files of one process."""

    def __init__(self, folder: Place, plan: dict[str, Any], documents: DocumentProcessor, remote: Remote):
        self.process = os.getpid()
        self.reader = DocumentReader(folder, plan, documents, remote)
        parts = Newest(lambda part: Part(folder / part_name(part)))
        self._batch = lru_cache(BATCHES)(lambda part, batch: parts[part].documents(batch))

    def documents(self, part: int, row: int) -> list[dict[str, Any]]:
        batch, row = divmod(row, PACKS_PER_BATCH)
        return self._batch(part, batch)[row].as_py()


def _check_tokenizer(folder: Place, plan: dict[str, Any], tokenizer: Any) -> None:
    fingerprint = tokenizer_fingerprint(tokenizer)
    if fingerprint != plan["tokenizer"]:
        raise ValueError(
            f"{folder} was planned with another tokenizer (fingerprint {plan['tokenizer'][:12]}, the processor's is "
            f"{fingerprint[:12]}): plan it again with this one"
        )


def _check_chat_template(folder: Place, plan: dict[str, Any], documents: DocumentProcessor) -> None:
    fingerprint = conversation_format(documents).fingerprint
    if fingerprint != plan["chat_template"]:
        raise ValueError(
            f"{folder} was planned with another chat template (fingerprint {plan['chat_template'][:12]}, the "
            f"processor's is {fingerprint[:12]}): plan it again with --processor set to this processor's folder"
        )


def check_files(folder: Place, plan: dict[str, Any]) -> None:
    """Raise ValueError for a file of a plan that is gone, or has another size or time (ETag) than it had."""
    files = [*plan["shards"], *(root for root in plan["images"] if "size" in root)]
    paths = [shard_path(folder, file) for file in files]
    for path, file, found in zip(paths, files, identities(paths), strict=True):
        if found is None:
            raise ValueError(f"{folder}: the file {path} of this plan is gone")
        for name, now in found.items():
            if now != file[name]:
                raise ValueError(
                    f"{folder}: the file {path} has changed since it was planned ({name} {file[name]}, now {now}): "
                    "plan it again"
                )
