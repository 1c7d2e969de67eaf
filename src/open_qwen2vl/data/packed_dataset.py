"""Packs as a map-style dataset: item i is read, decoded and tokenised when it is asked for, in the loader's workers.

    plan.json, part-*.parquet ──► pack i: documents ──► tars: image and text by offset ──► tensors of one pack

Map-style, so that a resumed run continues by index. In memory stand only the pack counts of the parts; a process opens
parts and tars when it first needs them and keeps the last few.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset

from ..processing.images import ImageError, decode_image
from ..processing.text_formats import caption_document, tokenize_captions, tokenizer_fingerprint
from .captions import decode_caption
from .plan_files import read_plan, shard_path
from .shards import MemberError, read_member

logger = logging.getLogger(__name__)

OPEN_FILES = 64  # tars, and as many parts, that one process keeps open
ROW_GROUPS = 8  # decoded row groups of parts that one process keeps


class PackedDataset(Dataset):
    """The packs of a finished plan.

    An item is a dict:

    - `input_ids`, `position_ids` (from 0 in each document), `labels` (-100 at images and at the first token of each
      document): int64 `(S,)`;
    - `pixel_values`: uint8 `(images, 3, H, W)`;
    - `image_seq_length`: the plan's, an int;
    - `dropped`: number of documents, by reason, that the plan holds but that could not be read. Such a document is
      left out whole; `S` is 0 where a pack has no other.

    Args:
        packs_dir (`str | Path`): folder of the plan.
        processor (`OpenQwen2VLProcessor`): its tokenizer must be the plan's.

    Raises:
        ValueError: if the plan is not finished, of another version, made with another tokenizer, or if one of its tars
            is gone or has changed.
    """

    def __init__(self, packs_dir: str | Path, processor: Any):
        self.folder = Path(packs_dir)
        self.processor = processor
        self.plan = read_plan(self.folder)
        _check_tokenizer(self.folder, self.plan, processor.tokenizer)
        _check_shards(self.folder, self.plan["shards"])
        self._ends = np.cumsum([part["packs"] for part in self.plan["parts"]], dtype=np.int64)
        self._files: _OpenFiles | None = None

    @property
    def image_seq_length(self) -> int:
        """Tokens per image of the plan."""
        return self.plan["image_seq_length"]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        index %= len(self)
        part = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[part - 1]) if part else 0)
        dropped: Counter = Counter()
        readable, captions, pixels = [], [], []
        for document in self._open_files().documents(part, row):
            try:
                caption, pixel_values = self._read(document)
            except (MemberError, ImageError) as error:
                self._drop(document, error, dropped)
                continue
            readable.append(document)
            captions.append(caption)
            pixels.append(pixel_values)
        return self._assemble(readable, captions, pixels, dropped)

    def _read(self, document: dict[str, Any]) -> tuple[str, torch.Tensor]:
        """Caption and uint8 pixels (1, 3, H, W) of a document."""
        tar = self._open_files().tar(document["shard"])
        image, text = (
            read_member(tar, f"{document['key']}.{member['ext']}", member["offset"], member["size"])
            for member in document["members"]
        )
        # One image at a time: twenty photographs at full size are more than what a pack keeps of them.
        return decode_caption(text), self.processor.resize_images([decode_image(image)])

    def _assemble(
        self, documents: list[dict[str, Any]], captions: list[str], pixels: list[torch.Tensor], dropped: Counter
    ) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        # An empty array first, for a pack that has lost all its documents.
        ids, labels, positions = ([np.empty(0, np.int64)] for _ in range(3))
        pixels_kept = [self.processor.resize_images([])]
        for document, text_ids, pixel_values in zip(
            documents, tokenize_captions(tokenizer, captions), pixels, strict=True
        ):
            input_ids, document_labels = caption_document(text_ids, tokenizer, self.image_seq_length)
            if len(input_ids) != document["tokens"]:
                error = MemberError("changed_caption", f"{len(input_ids)} tokens, {document['tokens']} in the plan")
                self._drop(document, error, dropped)
                continue
            ids.append(input_ids)
            labels.append(document_labels)
            positions.append(np.arange(len(input_ids)))
            pixels_kept.append(pixel_values)
        return {
            "input_ids": torch.from_numpy(np.concatenate(ids)),
            "position_ids": torch.from_numpy(np.concatenate(positions)),
            "labels": torch.from_numpy(np.concatenate(labels)),
            "pixel_values": torch.cat(pixels_kept),
            "image_seq_length": self.image_seq_length,
            "dropped": dict(dropped),
        }

    def _drop(self, document: dict[str, Any], error: MemberError | ImageError, dropped: Counter) -> None:
        dropped[error.reason] += 1
        tar = self.plan["shards"][document["shard"]]["path"]
        logger.warning("dropped %s/%s: %s (%s)", tar, document["key"], error.reason, error)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}

    def _open_files(self) -> "_OpenFiles":
        # A forked worker must not share file positions with its parent; a spawned one starts without files.
        if self._files is None or self._files.process != os.getpid():
            self._files = _OpenFiles(self.folder, self.plan)
        return self._files


class _OpenFiles:
    """The files of one process."""

    def __init__(self, folder: Path, plan: dict[str, Any]):
        self.process = os.getpid()
        shards, names = plan["shards"], [part["name"] for part in plan["parts"]]
        parts = _Newest(lambda part: pq.ParquetFile(folder / names[part]))
        self._tars = _Newest(lambda shard: open(shard_path(folder, shards[shard]), "rb", buffering=0))
        self._parts = parts
        self._row_group = lru_cache(ROW_GROUPS)(
            lambda part, group: parts[part].read_row_group(group, columns=["documents"], use_threads=False)
        )

    def tar(self, shard: int) -> int:
        return self._tars[shard].fileno()

    def documents(self, part: int, row: int) -> list[dict[str, Any]]:
        group, row = divmod(row, self._parts[part].metadata.row_group(0).num_rows)
        return self._row_group(part, group)["documents"][row].as_py()


class _Newest:
    """The files that were used last; older ones are closed."""

    def __init__(self, open_file: Callable[[int], Any]):
        self._open_file = open_file
        self._files: dict[int, Any] = {}

    def __getitem__(self, number: int) -> Any:
        file = self._files.pop(number, None) or self._open_file(number)
        self._files[number] = file  # dicts keep the order of insertion
        if len(self._files) > OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        return file


def _check_tokenizer(folder: Path, plan: dict[str, Any], tokenizer: Any) -> None:
    fingerprint = tokenizer_fingerprint(tokenizer)
    if fingerprint != plan["tokenizer"]:
        raise ValueError(
            f"{folder} was planned with another tokenizer (fingerprint {plan['tokenizer'][:12]}, the processor's is "
            f"{fingerprint[:12]}): plan it again with this one"
        )


def _check_shards(folder: Path, shards: list[dict[str, Any]]) -> None:
    for shard in shards:
        path = shard_path(folder, shard)
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            raise ValueError(f"{folder}: the tar {path} of this plan is gone") from None
        for name, found in (("size", stat.st_size), ("mtime_ns", stat.st_mtime_ns)):
            if found != shard[name]:
                raise ValueError(
                    f"{folder}: the tar {path} has changed since it was planned ({name} {shard[name]}, now {found}): "
                    "plan it again"
                )
