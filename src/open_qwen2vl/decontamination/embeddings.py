"""Evaluation pictures by the embeddings that `score --keep-embeddings` has kept of the pool.

sets ─ the model that made those ─► OUTPUT/contaminated/embedded: vectors.faiss, owners.npy, index.json
                                         │ faiss: the nearest by cosine, exact
embeddings of a tar ─────────────────────┴─► contaminated.embedding

The model is the one that the kept embeddings name: no option can say another.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..data.filtering.semantic import embedding_files
from ..data.scoring.embeddings import embeddings_of, read_embeddings, scored_recipe
from ..data.scoring.kinds import describe_option
from ..data.scoring.score_files import find_score_files
from ..data.scoring.scoring import describe_source
from ..files import new_folder
from ..places import Place
from ..processing.images import decode_image, to_rgb
from ..processing.sample_error import SampleError
from .index import Match, import_faiss, read_part, whole_file
from .sets import EvaluationSet, describe_set, readable_entries

LIMIT = 0.95  # of the cosine, in the report
_AT_ONCE, _LIKE = 32, 16  # pictures that are embedded, entries that a picture may be taken for
_PARTS = {"sets", "model", "files"}  # of index.json


class KeptEmbeddings(NamedTuple):
    """Embeddings of a pool."""

    files: dict[str, Place]  # by the name of the score file that they belong to
    model: str  # as of `score --model`
    pretrained: str | None
    name: str  # of both; of a folder with size and date


def find_kept(scores: Sequence[str], tasks: Iterable[Any]) -> KeptEmbeddings:
    """The embeddings of each task; a `ValueError` for several models, another one's, or a shard without any."""
    files: dict[str, Place] = {}
    for file in embedding_files(find_score_files(scores), "--embeddings"):
        if files.setdefault(file.name, file) != file:
            raise ValueError(f"--embeddings: {files[file.name]} and {file} are both of a shard {file.stem}: give one")
    for task in tasks:
        if task.output.name not in files:
            raise ValueError(f"--embeddings {', '.join(scores)}: no embeddings of {task.source}: score it first")
        _check_source(files[task.output.name], task)
    first = next(iter(files.values()))
    name, options = embeddings_of(first)[0], scored_recipe(first)["options"]
    model = options["model"]
    if not isinstance(model, dict):
        pretrained = name.removeprefix(f"{model}/") if "pretrained" in options else None
        return KeptEmbeddings(files, model, pretrained, name)
    if describe_option(name, first.parent.parent) != model:
        raise ValueError(f"--embeddings: the model {name} is not there, or it has changed since it scored the pool")
    written = np.datetime64(model["mtime_ns"], "ns")
    return KeptEmbeddings(files, name, None, f"{name} ({model['size']:,} bytes of {written})")


def _check_source(file: Place, task: Any) -> None:
    """A `ValueError` if embeddings are not of a task's shard as it is now."""
    # The path is relative to where the scores lie, which may be elsewhere.
    if {**scored_recipe(file)["source"], "path": None} != {**describe_source(task), "path": None}:
        raise ValueError(f"--embeddings: {file} is of another shard than {task.source}, or of what it was: score it")


class EmbeddedSets:
    """The index that [`embed_sets`] wrote, for one process; a `ValueError` that names the file if one is damaged."""

    def __init__(self, folder: Path):
        faiss = import_faiss()
        faiss.omp_set_num_threads(1)
        sizes = read_part(folder, "index.json", dict, _PARTS)["files"]
        with whole_file(folder / "owners.npy", sizes) as path:
            self.owners = np.load(path)
        with whole_file(folder / "vectors.faiss", sizes) as path:
            self._vectors = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)

    def nearest(self, file: Place) -> dict[str, Match]:
        """For each uid of a file of embeddings the entry of the largest cosine."""
        found: dict[str, Match] = {}
        for uids, vectors in read_embeddings(file, joint=False):
            cosines, rows = self._vectors.search(vectors, 1)
            for uid, cosine, row in zip(uids, cosines[:, 0].tolist(), rows[:, 0].tolist(), strict=True):
                found.setdefault(uid, Match(min(cosine, 1.0), int(self.owners[row])))
        return found

    def like(self, vector: np.ndarray) -> set[int]:
        """The entries, 16 at most, of which a vector float32 `(numbers,)` has a cosine of `LIMIT`."""
        cosines, rows = self._vectors.search(vector[None], _LIKE)
        return {
            int(self.owners[row])
            for cosine, row in zip(cosines[0], rows[0], strict=True)
            if cosine >= LIMIT and row >= 0
        }


def load_embedder(kept: KeptEmbeddings) -> Any:
    """The scorer that made the embeddings; a `ValueError` if its model cannot be loaded."""
    from ..data.scoring.clip import ClipScorer

    return ClipScorer(kept.model, kept.pretrained)


def embed_sets(folder: Path, sets: Sequence[EvaluationSet], kept: KeptEmbeddings, embedder: Any) -> None:
    """Write the index, or find that it is there; a `ValueError` if it was made of something else."""
    made = {"sets": [describe_set(each, folder) for each in sets], "model": kept.name}
    if folder.exists():
        before = read_part(folder, "index.json", dict, _PARTS)
        if {key: before[key] for key in made} != made:
            raise ValueError(
                f"{folder}: made by {before['model']}, now {kept.name}, or of other sets: choose another --output"
            )
        return
    faiss = import_faiss()
    owners: list[int] = []
    index = faiss.IndexFlatIP(embeddings_of(next(iter(kept.files.values())))[1])
    pictures = _pictures(sets, owners)
    for first in pictures:
        # One at a time is held at its full size: the embedder asks for them as it makes each small.
        index.add(embedder.embed_images(itertools.chain([first], itertools.islice(pictures, _AT_ONCE - 1))))
    if not owners:
        raise ValueError(f"--embeddings: no picture to compare with in {', '.join(each.name for each in sets)}")
    with new_folder(folder) as temporary:
        np.save(temporary / "owners.npy", np.array(owners, np.int64))
        faiss.write_index(index, str(temporary / "vectors.faiss"))
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        (temporary / "index.json").write_text(json.dumps({**made, "files": sizes}, indent=1) + "\n", encoding="utf-8")


def _pictures(sets: Sequence[EvaluationSet], owners: list[int]) -> Iterator[Image.Image]:
    """The pictures of all entries, whose numbers go to `owners`; what cannot be read is counted with the crops."""
    for number, entry in readable_entries(sets):
        for image in entry.images:
            with contextlib.suppress(SampleError):
                picture = decode_image(image) if isinstance(image, bytes) else to_rgb(image)
                owners.append(number)
                yield picture
