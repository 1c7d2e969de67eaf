"""Several pack sets as one dataset, and which pack each index stands for.

    Source ─► PackedDataset ─► PackMixture

Indices run through the sources one after the other; how often and in which order they are read is the business of
`pack_order.py`. Behind the last pack stands one empty pack for each source, which fills up an optimizer step.
"""

import functools
import json
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ...families import difference
from ..documents.documents import RANGES, Remote
from .packed_dataset import PackedDataset
from .sources import UNITS, Source
from .weights import loss_weights


def source_phases(sources: list[Source], options: list[dict[str, Any]]) -> list[list[int]]:
    """Numbers of the sources that may share a batch, phase by phase.

    Args:
        sources (`list[Source]`): their `phase` decides, where they have one.
        options (`list[dict]`): of each what it asks of the forward, which is one for a batch, as `image_seq_length`.
            Without phases, sources of other options come later, in the order in which they are listed.

    Returns:
        `list[list[int]]`: every source once.

    Raises:
        ValueError: if two sources of a phase have different options.
    """
    phases: dict[Any, list[int]] = {}
    for number, (source, own) in enumerate(zip(sources, options, strict=True)):
        key = json.dumps(own, sort_keys=True) if source.phase is None else source.phase
        phases.setdefault(key, []).append(number)
        first = phases[key][0]
        if own != options[first]:
            raise ValueError(
                f"the sources {sources[first].name!r} and {source.name!r} are both of phase {key}, and no batch can "
                f"hold packs of both ({difference(options[first], own)} in the second): give them different phases"
            )
    return list(phases.values()) if sources[0].phase is None else [phases[key] for key in sorted(phases)]


class PackMixture(Dataset):
    """The packs of all sources.

    An item is that of [`PackedDataset`] with two ints more: `source`, the number of its source, and `pack`, its index
    here; where loss weights of sources differ also with `loss_weight`, scaled so that the labels of an epoch have a
    mean of 1. `len` is the number of distinct packs; `mixture[len(mixture) + s]` is an empty pack (`S` = 0) for source
    `s`.

    Args:
        sources (`list[Source]`): from [`parse_sources`].
        processor (`ProcessorMixin`): its tokenizer must be the plans'.
        files_checked (`bool`, *optional*, defaults to `False`): as of [`PackedDataset`].
        remote (`Remote`, *optional*): as of [`PackedDataset`].

    Raises:
        ValueError: as [`PackedDataset`] and [`source_phases`], or for a source without packs.
    """

    def __init__(self, sources: list[Source], processor: Any, files_checked: bool = False, remote: Remote = RANGES):
        self.sources = list(sources)
        self.datasets = [PackedDataset(source.path, processor, files_checked, remote) for source in self.sources]
        for source, dataset in zip(self.sources, self.datasets, strict=True):
            if not len(dataset):
                raise ValueError(f"{source.path} holds no packs")
        options = [dataset.documents.forward_options() for dataset in self.datasets]
        self.phases = source_phases(self.sources, options)
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets])
        self.loss_weights = loss_weights(self.sources, [dataset.plan for dataset in self.datasets])

    def _per_pack(self, column: str) -> np.ndarray:
        columns = [dataset.per_pack(column) for dataset in self.datasets]
        return columns[0] if len(columns) == 1 else np.concatenate(columns)  # a single one stays mapped

    @functools.cached_property
    def patches_per_pack(self) -> np.ndarray:
        """Patches of each pack, int32 `(packs,)`."""
        return self._per_pack("patches")

    @functools.cached_property
    def labels_per_pack(self) -> np.ndarray:
        """Labelled positions of each pack as planned, int32 `(packs,)`."""
        return self._per_pack("labels")

    def __getstate__(self) -> dict[str, Any]:
        # The loader's workers need neither, and a billion pairs have 45 million packs.
        return {name: value for name, value in self.__dict__.items() if not name.endswith("_per_pack")}

    @property
    def names(self) -> list[str]:
        """Names of the sources."""
        return [source.name for source in self.sources]

    @property
    def max_length(self) -> int:
        """Positions of the longest pack that may come."""
        return max(dataset.plan["max_length"] for dataset in self.datasets)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides which packs are read and when: by source its place, its plan's hash, weight and so on."""
        return {
            source.name: {
                "place": place,
                "plan": dataset.fingerprint,
                "weight": source.weight,
                "epochs": source.epochs,
                **({} if source.weight_by == UNITS[0] else {"weight_by": source.weight_by}),
                **({} if source.phase is None else {"phase": source.phase}),
                **({} if source.max_epochs is None else {"max_epochs": source.max_epochs}),
                **({} if source.loss_weight == 1 else {"loss_weight": source.loss_weight}),
            }
            for place, (source, dataset) in enumerate(zip(self.sources, self.datasets, strict=True))
        }

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, pack = self._locate(index)
        dataset = self.datasets[source]
        item = dataset.empty_pack() if pack is None else dataset[pack]
        item = {**item, "source": source, "pack": index}
        return item if self.loss_weights is None else {**item, "loss_weight": self.loss_weights[source]}

    def describe(self, index: int) -> dict[str, Any]:
        """What stands in a pack, for messages.

        Args:
            index (`int`): its index in the mixture.

        Returns:
            `dict`: `source`, the name; `pack`, the number of the pack in its source, `None` for an empty one; and
            `documents`, a list of pairs: path of the tar, key of the sample.
        """
        source, pack = self._locate(index)
        documents = [] if pack is None else self.datasets[source].document_names(pack)
        return {"source": self.names[source], "pack": pack, "documents": documents}

    def fetch_ahead(self, packs: np.ndarray) -> None:
        """Have the shards of packs that come soon fetched into the cache of [`PackedDataset`], if there is one."""
        packs = packs[packs < len(self)]
        numbers = np.searchsorted(self._ends, packs, side="right")
        for number in np.unique(numbers).tolist():
            first = int(self._ends[number - 1]) if number else 0
            dataset = self.datasets[number]
            parts = np.searchsorted(dataset.part_ends, packs[numbers == number] - first, side="right")
            dataset.fetch_ahead(dict.fromkeys(parts.tolist()))

    def _locate(self, index: int) -> tuple[int, int | None]:
        """Source and pack in it; no pack for the empty ones behind the last."""
        if not 0 <= index < len(self) + len(self.sources):
            raise IndexError(f"pack {index} of {len(self)}")
        if index >= len(self):
            return index - len(self), None
        source = int(np.searchsorted(self._ends, index, side="right"))
        return source, index - (int(self._ends[source - 1]) if source else 0)
