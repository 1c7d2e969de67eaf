"""The files of scores, `OUTPUT/NAME/TAR.parquet`: what stands in them and how they are written and found.

One row for each sample and value. Its file is the done-marker of a tar: renamed into place when it is whole, and with
what it was made from in its metadata. The same input gives the same bytes.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...files import renamed_when_whole
from ...places import Place, arrow_source, is_remote, place, remote_errors_named
from ...transfers import make_folder

FORMAT_VERSION = 1
_METADATA_KEY = b"open_qwen2vl"
_ROW_GROUP = 1 << 17
_LABEL = pa.dictionary(pa.int32(), pa.string())

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # of the sample in its tar; null where the scores come from a table
        ("uid", pa.string()),  # 32 lower-case hex digits
        ("scorer", _LABEL),  # NAME, or NAME.PART of a scorer with several values
        ("model", _LABEL),
        ("value", pa.float64()),  # null where there is none, never NaN
        ("reason", _LABEL),  # why there is none; null where there is a value
    ]
)
HASH_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("bytes_hash", pa.uint64()),  # the first 8 bytes, big-endian, of SHA-256 of the image file
        ("phash", pa.uint64()),  # perceptual hash of 8x8 bits, the first bit the highest
    ]
)

DETAIL = pa.field("detail", pa.string())  # of some scores: what a value comes from, shown with it in reasons
EMBEDDINGS = "embeddings"  # the folder of what is kept of them, beside the score files
RECORDS_OF = "records"  # in the recipe of scores of conversations
SEPARATOR = ", "  # between the concepts of a caption, in that column


def score_table(
    labels: Sequence[str],
    model: str,
    keys: Sequence[str | None],
    uids: Sequence[str],
    values: np.ndarray,
    reasons: Sequence[str | None],
    missing_reason: str | None,
) -> pa.Table:
    """The rows of some samples, a table of `SCHEMA`: all of the first label, then all of the next.

    `values` are float64 `(samples, labels)`; what is not finite has no value, and `missing_reason` where it has none.
    """
    samples, parts = values.shape
    flat = values.T.reshape(-1)
    missing = ~np.isfinite(flat)
    why = [
        reason or missing_reason if gone else None for reason, gone in zip(list(reasons) * parts, missing, strict=True)
    ]
    columns = (
        pa.array(list(keys) * parts, pa.string()),
        pa.array(list(uids) * parts, pa.string()),
        pa.DictionaryArray.from_arrays(np.repeat(np.arange(parts, dtype=np.int32), samples), pa.array(labels)),
        pa.DictionaryArray.from_arrays(np.zeros(samples * parts, np.int32), pa.array([model])),
        pa.array(flat, pa.float64(), mask=missing),
        pa.array(why, pa.string()).dictionary_encode(),
    )
    return pa.table(columns, schema=SCHEMA)


def write_scores(path: Place, tables: pa.Table | Iterable[pa.Table], metadata: Mapping[str, Any]) -> None:
    """Write a score file of one table or of several, of which one is in memory at a time.

    `metadata` is read when all are written, so that an iterator of tables may still count.
    """
    make_folder(path.parent)
    pieces = iter([tables] if isinstance(tables, pa.Table) else tables)
    first = next(pieces, SCHEMA.empty_table())
    with renamed_when_whole(path) as temporary:
        with pq.ParquetWriter(temporary, first.schema, compression="zstd") as writer:
            for piece in itertools.chain([first], pieces):
                writer.write_table(piece, row_group_size=_ROW_GROUP)
            whole = {"format_version": FORMAT_VERSION, **metadata}
            writer.add_key_value_metadata({_METADATA_KEY: json.dumps(whole, sort_keys=True).encode()})


def read_score_metadata(path: Place) -> dict[str, Any]:
    """What [`write_scores`] got as metadata, and `format_version`; a `ValueError` for a file without scores."""
    try:
        metadata = json.loads(pq.read_metadata(arrow_source(path)).metadata[_METADATA_KEY])
        version = metadata["format_version"]
        pq_names = set(pq.read_schema(arrow_source(path)).names)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: not a file of scores, as open-qwen2vl score writes them") from error
    if not pq_names.issuperset(SCHEMA.names):
        raise ValueError(f"{path}: not a file of scores, as open-qwen2vl score writes them")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this code reads {FORMAT_VERSION}")
    return metadata


def find_score_files(paths: Iterable[str | Place]) -> list[Place]:
    """The score files that files, and folders at any depth, stand for, once each; or a `ValueError`."""
    found: dict[Place, Place] = {}
    for path in map(place, paths):
        with remote_errors_named(path):
            if not path.exists():
                raise ValueError(f"{path}: no such file or folder of scores")
            files = [path]
            if path.is_dir():
                files = sorted(file for file in path.rglob("*.parquet") if file.parent.name != EMBEDDINGS)
        if not files:
            raise ValueError(f"{path}: no .parquet file in this folder or below it")
        for file in files:
            found.setdefault(file if is_remote(file) else file.resolve(), file)
    if not found:
        raise ValueError("no scores given: name at least one score file or a folder of them")
    return list(found.values())
