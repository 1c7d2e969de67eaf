"""The embeddings that `score --keep-embeddings` keeps: `OUTPUT/NAME/embeddings/TAR.parquet`, 16 bits a number.

One row for each sample that has a score; the model, and what the scores say that they were made with, stand in the
metadata. No score file: the filter looks for them beside those.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...files import renamed_when_whole
from ...places import Place, arrow_source
from ...transfers import make_folder
from .score_files import EMBEDDINGS, read_score_metadata

_METADATA_KEY = b"open_qwen2vl_embeddings"
_ROWS = 1 << 15


def embeddings_file(score_file: Place) -> Place:
    """Where the embeddings of a score file's samples are."""
    return score_file.parent / EMBEDDINGS / score_file.name


def keeps_embeddings(score_file: Place) -> bool:
    """Whether a score file was made with `--keep-embeddings`."""
    return bool(read_score_metadata(score_file).get("recipe", {}).get("options", {}).get("keep_embeddings"))


def write_embeddings(
    path: Place, uids: Sequence[str], image: np.ndarray, text: np.ndarray, model: str, made: Mapping[str, Any]
) -> None:
    """Write unit vectors `(samples, numbers)` of images and texts, as float16; `made` is of the scores' metadata."""
    make_folder(path.parent)
    kind = pa.list_(pa.float16(), image.shape[1])
    columns = [pa.FixedSizeListArray.from_arrays(_halves(vectors), type=kind) for vectors in (image, text)]
    table = pa.table({"uid": pa.array(uids, pa.string()), "image": columns[0], "text": columns[1]})
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps({"model": model, "made": made}).encode()})
    with renamed_when_whole(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=_ROWS)


def _halves(vectors: np.ndarray) -> pa.Array:
    return pa.array(np.ascontiguousarray(vectors, np.float16).reshape(-1), pa.float16())


def embeddings_of(path: Place) -> tuple[str, int]:
    """Model and size of the vectors of a file; a `ValueError` for one that holds none."""
    return _describe(path)[:2]


def scored_recipe(path: Place) -> dict[str, Any]:
    """`source` and `options` of the `score` that made a file's vectors; a `ValueError` if it does not say."""
    recipe = _describe(path)[2].get("recipe", {})
    if not recipe.keys() >= {"source", "options"}:
        raise ValueError(f"{path}: does not say what it was made of: run that score again")
    return recipe


def check_embeddings(score_file: Place) -> None:
    """A `ValueError` if the embeddings of a score file are missing, damaged, or not of the run that scored it."""
    path, scores = embeddings_file(score_file), read_score_metadata(score_file)
    if not path.is_file():
        raise ValueError(f"{path}: missing, but {score_file} was made with --keep-embeddings: run that score again")
    model, _, made = _describe(path)
    if made != {key: scores.get(key) for key in made} or "recipe" not in made:
        raise ValueError(
            f"{path}: embeddings of {model}, made with other options or of another tar than {score_file}: "
            "run that score again"
        )


def _describe(path: Place) -> tuple[str, int, dict[str, Any]]:
    with _readable(path):
        schema = pq.read_schema(arrow_source(path))
        metadata = json.loads(schema.metadata[_METADATA_KEY])
        size = schema.field("image").type.list_size
        if schema.field("text").type != schema.field("image").type or schema.field("uid").type != pa.string():
            raise ValueError("its columns are of other types")
        return metadata["model"], size, dict(metadata.get("made", {}))


def read_embeddings(path: Place, joint: bool) -> Iterator[tuple[list[str], np.ndarray]]:
    """Uids and unit vectors float32 `(rows, numbers)`, some rows at a time; what is not finite or 0 is left out.

    With `joint` image and text side by side: a product of two is the mean of the cosines of both.
    """
    with _readable(path), pq.ParquetFile(arrow_source(path)) as file:
        for batch in file.iter_batches(_ROWS, columns=["uid", "image", "text"] if joint else ["uid", "image"]):
            parts = [_unit(batch[name]) for name in batch.schema.names[1:]]
            vectors = np.concatenate(parts, axis=1) / np.sqrt(len(parts), dtype=np.float32)
            whole = np.isfinite(vectors).all(axis=1)
            if batch["uid"].null_count:
                raise ValueError("a uid is missing")
            uids = batch["uid"].filter(pa.array(whole))
            if pc.sum(pc.invert(pc.match_substring_regex(uids, "^[0-9a-f]{32}$"))).as_py():
                raise ValueError("a uid is not 32 hex digits")
            yield uids.to_pylist(), vectors[whole]


def _unit(column: pa.FixedSizeListArray) -> np.ndarray:
    if column.null_count:
        raise ValueError("a vector is missing")
    vectors = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class _readable:
    """What is wrong with a file, as a ValueError with its name."""

    def __init__(self, path: Place):
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        damage = (pa.ArrowException, KeyError, TypeError, AttributeError, ValueError, UnicodeDecodeError)
        if isinstance(error, OSError) and error.errno is None or isinstance(error, damage):
            raise ValueError(
                f"{self._path}: no embeddings of score --keep-embeddings: {error}; delete it and score again"
            ) from error
