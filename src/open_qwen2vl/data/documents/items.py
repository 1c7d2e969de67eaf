"""A document of a plan, the same as it is trained, and the item of a dataset that documents make together."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from ...families.interface import DocumentProcessor, Media, VisionWork
from .forms import Prefix
from .record_images import PlannedImage
from .records import RecordLocation


class Shareable(NamedTuple):
    """What a conversation may share: its prefix with the picture at its end."""

    picture: tuple  # equal for the same picture
    prefix: Prefix
    patches: int  # of the picture


class Document(NamedTuple):
    """A document of a plan, or a branch of the one before it, on whose picture it is (shared_pictures.py)."""

    shard: int  # index of its file in the plan's list
    key: str  # name of its record
    uid: str  # 32 hex digits
    record: RecordLocation  # where that is
    entries: tuple[int, int] | None  # the first of the record's entries, or branches, and their number; None for all
    tokens: int  # positions that it takes
    images: list[PlannedImage]  # its images in reading order; a branch's first is that of the document
    shared: int  # positions before its own, up to the end of the picture; 0 for a document
    labels: int  # labelled positions
    patches: int  # of its images, the unit of visual load
    shareable: Shareable | None = None  # what it has in common with others, where pictures are shared

    @property
    def own_images(self) -> list[PlannedImage]:
        """The images that are encoded for it."""
        return self.images[1:] if self.shared else self.images


class ReadDocument(NamedTuple):
    """A document as it is trained: int64 ids and labels `(S,)`, positions `(rope_rows, S)`, and its media."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    media: dict[str, torch.Tensor]
    count: int
    work: VisionWork


def finish_document(
    family: DocumentProcessor,
    input_ids: np.ndarray,
    labels: np.ndarray,
    media: list[Media],
    tensors: list[dict[str, torch.Tensor]],
    shared: int = 0,
) -> ReadDocument:
    """Add what follows from ids and media: the media joined, positions, and what encoding them costs; of a branch what
    stands behind the `shared` positions, the last of which shows its first medium.
    """
    joined, own = join_media(family, tensors), 1 if shared else 0
    positions = family.position_ids(input_ids, joined)[:, shared:]
    work = VisionWork(*map(sum, zip(VisionWork(), *map(family.vision_work, media[own:]), strict=True)))
    if shared:
        joined = join_media(family, tensors[own:])
    return ReadDocument(input_ids[shared:], labels[shared:], positions, joined, len(media) - own, work)


def join_media(family: DocumentProcessor, tensors: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of several images or documents, joined by their names along the first dimension."""
    parts = [family.empty_media(), *tensors]
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0]}


def empty_document(family: DocumentProcessor) -> ReadDocument:
    """No document at all: `S` = 0."""
    nothing = np.empty(0, np.int64)
    return ReadDocument(
        nothing, nothing, np.empty((family.rope_rows, 0), np.int64), family.empty_media(), 0, VisionWork()
    )


def pack_item(family: DocumentProcessor, documents: list[ReadDocument], dropped: Counter) -> dict[str, Any]:
    """An item of a dataset: the documents behind each other, and what the collator and the model need to know."""
    # Nothing first, for a pack that has lost all its documents.
    ids, labels, positions, media, counts, works = zip(empty_document(family), *documents, strict=True)
    input_ids, position_ids = (torch.from_numpy(np.concatenate(rows, axis=-1)) for rows in (ids, positions))
    names = family.placeholder_names
    return {
        "input_ids": input_ids,
        "position_ids": position_ids[0] if family.rope_rows == 1 else position_ids,
        "labels": torch.from_numpy(np.concatenate(labels)),
        **join_media(family, media),
        **family.forward_options(),
        "placeholders": {name: torch.nonzero(input_ids == token).squeeze(1) for name, token in names.items()},
        "on_host": family.host_names,
        "media": sum(counts),
        "vision_work": VisionWork(*map(sum, zip(*works, strict=True))),
        "dropped": dict(dropped),
    }
