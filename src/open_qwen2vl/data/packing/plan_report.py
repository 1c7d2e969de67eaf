"""The figures of a plan: of one part, of all parts together, and as lines to print."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa


@dataclass
class PlanReport:
    """Figures of a plan or of one part of it.

    Attributes:
        samples (`int`): documents and skipped samples together.
        documents (`int`): documents planned.
        packs (`int`): rows of the plan.
        tokens (`int`): positions of all documents.
        images (`int`): images of all documents, and videos.
        patches (`int`): patches of all images, the unit of visual load.
        labels (`int`): labelled positions of all documents.
        max_length (`int`): positions of a pack.
        skipped (`dict[str, int]`): samples left out, by reason.
        ignored_members (`int`): members of the tars that belong to no sample, as folders and links.
        documents_per_pack (`Sequence[int]`): fewest and most; empty without packs.
        images_per_pack (`Sequence[int]`): fewest and most; empty without packs.
        videos (`int`): how many of `images` are videos.
        broken_videos (`int`): videos that break off, of which what is there is shown.
        squared_lengths (`int`): sum over documents of length squared, of what shares a picture what it adds: the unit
            of attention.
        shared (`int`): conversations that take the picture of the one before them: so many pictures are saved.
        shared_tokens (`int`): positions that these save.
        unshared (`dict[str, int]`): conversations that have their picture with others and share it with none, by
            reason.
        not_chosen (`int`): samples, or records, that `--subset` does not name; counted nowhere else.
    """

    samples: int
    documents: int
    packs: int
    tokens: int
    images: int
    patches: int
    labels: int
    max_length: int
    skipped: dict[str, int]
    ignored_members: int
    documents_per_pack: Sequence[int]
    images_per_pack: Sequence[int]
    videos: int = 0
    broken_videos: int = 0
    squared_lengths: int = 0
    shared: int = 0
    shared_tokens: int = 0
    unshared: dict[str, int] = field(default_factory=dict)
    not_chosen: int = 0

    @classmethod
    def of_part(
        cls,
        packs: pa.Table,
        max_length: int,
        skipped: Sequence[Any],
        ignored_members: int,
        videos: int = 0,
        broken_videos: int = 0,
        unshared: dict[str, int] | None = None,
        not_chosen: int = 0,
    ) -> "PlanReport":
        """Figures of a part, from its rows and the [`Skipped`] of what is left out."""
        documents = np.asarray(packs["documents"].combine_chunks().value_lengths())
        images = np.asarray(packs["images"])
        rows = packs["documents"].combine_chunks().flatten()
        tokens, shared = (np.asarray(rows.field(name)).astype(np.int64) for name in ("tokens", "shared"))
        return cls(
            samples=int(documents.sum()) + len(skipped),
            documents=int(documents.sum()),
            packs=len(documents),
            tokens=int(np.asarray(packs["tokens"]).sum(dtype=np.int64)),
            images=int(images.sum(dtype=np.int64)),
            patches=int(np.asarray(packs["patches"]).sum(dtype=np.int64)),
            labels=int(np.asarray(packs["labels"]).sum(dtype=np.int64)),
            max_length=max_length,
            skipped=dict(Counter(one.reason for one in skipped)),
            ignored_members=ignored_members,
            documents_per_pack=_extremes(documents.tolist()),
            images_per_pack=_extremes(images.tolist()),
            videos=videos,
            broken_videos=broken_videos,
            squared_lengths=int(((tokens + shared) ** 2 - shared**2).sum()),
            shared=int(np.count_nonzero(shared)),
            shared_tokens=int(shared.sum()),
            unshared=unshared or {},
            not_chosen=not_chosen,
        )

    @classmethod
    def of_parts(cls, parts: Sequence["PlanReport"]) -> "PlanReport":
        """Figures of a whole plan; its parts all have the same `max_length`."""
        summed = ("samples", "documents", "packs", "tokens", "images", "patches", "labels", "ignored_members")
        summed = (*summed, "videos", "broken_videos", "squared_lengths", "shared", "shared_tokens", "not_chosen")
        joined = ("documents_per_pack", "images_per_pack")
        skipped, unshared = (
            sum((Counter(getattr(part, name)) for part in parts), Counter()) for name in ("skipped", "unshared")
        )
        return cls(
            max_length=parts[0].max_length,
            skipped=dict(sorted(skipped.items())),
            unshared=dict(sorted(unshared.items())),
            **{name: sum(getattr(part, name) for part in parts) for name in summed},
            **{name: _extremes([n for part in parts for n in getattr(part, name)]) for name in joined},
        )

    @property
    def fill(self) -> float:
        """Share of the packs' positions that documents take, 0 to 1."""
        return self.tokens / (self.packs * self.max_length) if self.packs else 0.0

    def __str__(self) -> str:
        reasons, alone = (
            ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
            for counts in (self.skipped, self.unshared)
        )
        lines = {
            "samples": f"{self.samples:,}",
            "packed": f"{self.documents:,}",
            "skipped": f"{sum(self.skipped.values()):,}" + (f" ({reasons})" if reasons else ""),
            "packs": f"{self.packs:,} of {self.max_length:,} positions",
            "fill": f"{self.fill:.2%}",
            "documents": _per_pack(self.documents, self.packs, self.documents_per_pack),
            "images": _per_pack(self.images, self.packs, self.images_per_pack),
        }
        if self.shared or self.unshared:
            lines["shared"] = f"{self.shared:,} pictures and {self.shared_tokens:,} positions saved"
            lines["shared"] += f"; alone on a picture of several: {alone}" if alone else ""
        if self.videos:
            broken = f" ({self.broken_videos:,} break off: what is there is shown)" if self.broken_videos else ""
            lines["videos"] = f"{self.videos:,} of these{broken}"
        if self.not_chosen:
            lines["not chosen"] = f"{self.not_chosen:,} samples that --subset does not name"
        if self.ignored_members:
            lines["ignored"] = f"{self.ignored_members:,} members that are no file of a sample (folders, links, ...)"
        return "\n".join(f"{name:<11}{value}" for name, value in lines.items())


def _extremes(counts: Sequence[int]) -> list[int]:
    return [min(counts), max(counts)] if counts else []


def _per_pack(count: int, packs: int, extremes: Sequence[int]) -> str:
    return f"{count / packs:.1f} a pack (min {extremes[0]}, max {extremes[1]})" if packs else "none"
