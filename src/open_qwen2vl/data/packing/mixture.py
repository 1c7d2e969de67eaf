"""Several pack sets as one dataset: what `train_packs` of a recipe may name, and which pack each index stands for.

    a folder, or a YAML list of {path, name?, weight? | epochs?, phase?} ─► Source ─► PackedDataset ─► PackMixture

Indices run through the sources one after the other; how often and in which order they are read is the business of
`pack_order.py`. Behind the last pack stands one empty pack for each source, which fills up an optimizer step.
"""

import functools
import json
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ...families import difference
from .packed_dataset import PackedDataset

_KEYS = ("path", "name", "weight", "epochs", "weight_by", "phase")
UNITS = ("packs", "tokens", "samples")  # that weights count


@dataclass(frozen=True)
class Source:
    """One pack set of a mixture, with either `weight` or `epochs`.

    Attributes:
        name (`str`): shown in logs; unique within the mixture.
        path (`str`): folder of its plan.
        weight (`float`, *optional*): its share in what is read, relative to the other sources' weights.
        epochs (`float`, *optional*): how often each of its packs is read in an epoch of the run.
        weight_by (`str`, *optional*, defaults to `"packs"`): what weights count: packs, tokens or samples.
        phase (`int`, *optional*): sources of a lower one are all read before, in each epoch.
    """

    name: str
    path: str
    weight: float | None = None
    epochs: float | None = None
    weight_by: str = "packs"
    phase: int | None = None


def parse_sources(value: str | list[dict[str, Any]]) -> list[Source]:
    """Read what names the packs of a run.

    Args:
        value (`str | list[dict]`): a folder, or a list of entries with `path` and, each optional, `name` (the folder's
            by default) and either `weight` (in all entries or in none), perhaps with `weight_by` (the same in all:
            packs, which is the default, tokens or samples), or `epochs` (1 by default); and `phase`, a whole number
            (in all entries or in none), by which sources are read one after the other.

    Returns:
        `list[Source]`: at least one.

    Raises:
        ValueError: for anything else; it names the entry.
    """
    entries = [{"path": value}] if isinstance(value, str) else value
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"packs must be a folder or a list of {{path, name, weight or epochs}}, got {value!r}")
    sources = [_parse_source(number, entry) for number, entry in enumerate(entries, start=1)]
    for key in ("weight", "phase"):
        given = [getattr(source, key) is not None for source in sources]
        if any(given) and not all(given):
            raise ValueError(
                f"source {sources[given.index(False)].name!r} has no {key}: give all of them one, or none"
            )
    if len({source.weight_by for source in sources}) > 1:
        raise ValueError("weight_by must be the same in all sources of a mixture")
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two sources are named {name!r}: give one of them another `name`")
    return sources


def _parse_source(number: int, entry: Any) -> Source:
    where = f"source {number} of the packs"
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise ValueError(f"{where} needs a `path`, got {entry!r}")
    unknown = [key for key in entry if key not in _KEYS]
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    name = entry.get("name", os.path.basename(os.path.abspath(entry["path"])))
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} has the name {name!r}, which must be a word")
    weight, epochs = (_positive(f"{key} of {where}", entry.get(key)) for key in ("weight", "epochs"))
    if weight is not None and epochs is not None:
        raise ValueError(f"{where} has both a weight and epochs; give one of them")
    weight_by = entry.get("weight_by", UNITS[0])
    if weight_by not in UNITS or ("weight_by" in entry and weight is None):
        raise ValueError(f"weight_by of {where} is {', '.join(UNITS[:-1])} or {UNITS[-1]}, of sources with a weight")
    phase = entry.get("phase")
    if phase is not None and (not isinstance(phase, int) or isinstance(phase, bool)):
        raise ValueError(f"phase of {where} must be a whole number, got {phase!r}")
    return Source(name, entry["path"], weight, 1.0 if weight is None and epochs is None else epochs, weight_by, phase)


def _positive(what: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML takes 1e6 for a word
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{what} must be a positive number, got {value!r}")
    return number


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
    here. `len` is the number of distinct packs; `mixture[len(mixture) + s]` is an empty pack (`S` = 0) for source `s`.

    Args:
        sources (`list[Source]`): from [`parse_sources`].
        processor (`ProcessorMixin`): its tokenizer must be the plans'.
        files_checked (`bool`, *optional*, defaults to `False`): as of [`PackedDataset`].

    Raises:
        ValueError: as [`PackedDataset`] and [`source_phases`], or for a source without packs.
    """

    def __init__(self, sources: list[Source], processor: Any, files_checked: bool = False):
        self.sources = list(sources)
        self.datasets = [PackedDataset(source.path, processor, files_checked) for source in self.sources]
        for source, dataset in zip(self.sources, self.datasets, strict=True):
            if not len(dataset):
                raise ValueError(f"{source.path} holds no packs")
        options = [dataset.documents.forward_options() for dataset in self.datasets]
        self.phases = source_phases(self.sources, options)
        self.patches_per_pack = self._per_pack("patches")
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets])

    def _per_pack(self, column: str) -> np.ndarray:
        return np.concatenate([dataset.per_pack(column) for dataset in self.datasets])

    @functools.cached_property
    def labels_per_pack(self) -> np.ndarray:
        """Labelled positions of each pack as planned, int64 `(packs,)`; read when first asked for."""
        return self._per_pack("labels")

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
        """What decides which packs are read and when: by source its place, its plan's hash, weight and epochs."""
        return {
            source.name: {
                "place": place,
                "plan": dataset.fingerprint,
                "weight": source.weight,
                "epochs": source.epochs,
                **({} if source.weight_by == UNITS[0] else {"weight_by": source.weight_by}),
                **({} if source.phase is None else {"phase": source.phase}),
            }
            for place, (source, dataset) in enumerate(zip(self.sources, self.datasets, strict=True))
        }

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, pack = self._locate(index)
        dataset = self.datasets[source]
        item = dataset.empty_pack() if pack is None else dataset[pack]
        return {**item, "source": source, "pack": index}

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

    def _locate(self, index: int) -> tuple[int, int | None]:
        """Source and pack in it; no pack for the empty ones behind the last."""
        if not 0 <= index < len(self) + len(self.sources):
            raise IndexError(f"pack {index} of {len(self)}")
        if index >= len(self):
            return index - len(self), None
        source = int(np.searchsorted(self._ends, index, side="right"))
        return source, index - (int(self._ends[source - 1]) if source else 0)
