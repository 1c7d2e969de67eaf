"""The files of a plan: what stands in them and how they are written.

    plan.json              options and fingerprints, the files that it was made from, the parts, the totals
    part-00000.parquet     a pack in each row: tokens, images, patches, labels; documents, and where each is
    figures.npy            tokens, images, patches, labels of all packs, int32 (4, packs): a run reads no part to start
    skipped-00000.parquet  a sample left out in each row: file, key, reason, detail

A reader needs one row at a time and in any order, hence small row groups. Every file is written under another name and
renamed when it is whole.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...files import renamed_when_whole, write_text
from ...places import Place, arrow_source
from ..documents.documents import Skipped
from ..documents.items import Document
from ..storage.open_files import map_array

PLAN_NAME, FIGURES_NAME = "plan.json", "figures.npy"
FIGURES = ("tokens", "images", "patches", "labels")  # of a pack; columns of a part, rows of `figures.npy`
FORMAT_VERSION = 3
PACKS_PER_ROW_GROUP = 64
_METADATA_KEY = b"open_qwen2vl"

_RECORD = pa.struct([("offset", pa.int64()), ("size", pa.int64()), ("row", pa.int64())])
_ENTRIES = pa.struct([("first", pa.int32()), ("count", pa.int32())])
_IMAGE = pa.struct(
    [
        ("root", pa.int32()),  # of the plan's images; -1: the document's own tar, or the folder of its table
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("frames", pa.int32()),  # of a video as its header has them; 0: an image
        ("fps", pa.float64()),
    ]
)
_DOCUMENT = pa.struct(
    [
        ("shard", pa.int32()),  # index into the plan's list of files
        ("key", pa.string()),
        ("uid", pa.string()),
        ("record", _RECORD),
        ("entries", _ENTRIES),  # of its record; null: the whole record
        ("tokens", pa.int32()),
        ("images", pa.list_(_IMAGE)),  # in reading order
        ("shared", pa.int32()),  # positions that are those of the document before; 0: a document of its own
    ]
)
_SKIPPED = pa.schema([(name, pa.string()) for name in Skipped._fields])


def packs_table(documents: list[Document], pack_of_document: np.ndarray) -> pa.Table:
    """Rows of a part: one for each pack, numbered from 0 without a gap, its documents in the order given."""
    order = np.argsort(pack_of_document, kind="stable")
    counts = np.bincount(pack_of_document)
    figures = {
        "tokens": [document.tokens for document in documents],
        "images": [len(document.own_images) for document in documents],
        "patches": [document.patches for document in documents],
        "labels": [document.labels for document in documents],
    }
    columns = {
        name: np.bincount(pack_of_document, weights=values).astype(np.int64 if name == "patches" else np.int32)
        for name, values in figures.items()
    }
    rows = pa.ListArray.from_arrays(
        np.concatenate([[0], counts.cumsum()]).astype(np.int32),
        pa.array([documents[i][: _DOCUMENT.num_fields] for i in order], type=_DOCUMENT),
    )
    return pa.table({**columns, "documents": rows})


def write_part(path: Place, table: pa.Table, metadata: dict[str, Any]) -> None:
    """Write a part with what it was made from."""
    _write_table(path, table.replace_schema_metadata({_METADATA_KEY: json.dumps(metadata, sort_keys=True)}))


def read_part_metadata(path: Place) -> dict[str, Any]:
    """What a part was made from, as given to [`write_part`]; a `ValueError` if it is no part of a plan."""
    try:
        return json.loads(pq.read_schema(arrow_source(path)).metadata[_METADATA_KEY])
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a part of a plan; delete it") from error


def write_skipped(path: Place, rows: list[Skipped]) -> None:
    """Write the list of the samples that a part leaves out."""
    columns = zip(*rows, strict=True) if rows else [[]] * len(_SKIPPED)
    _write_table(path, pa.table([pa.array(column, pa.string()) for column in columns], schema=_SKIPPED))


def write_plan(folder: Place, plan: dict[str, Any]) -> None:
    """Write `plan.json`, unless it already stands there."""
    path, text = folder / PLAN_NAME, json.dumps(plan, indent=1, sort_keys=True) + "\n"
    if not path.exists() or path.read_text(encoding="utf8") != text:
        write_text(path, text)


def write_figures(folder: Place, parts: Sequence[Place]) -> None:
    """Write `figures.npy` from the parts, unless it already stands there."""
    figures = np.stack([read_column(parts, name).astype(np.int32) for name in FIGURES])
    if not (folder / FIGURES_NAME).exists() or not np.array_equal(map_array(folder / FIGURES_NAME), figures):
        with renamed_when_whole(folder / FIGURES_NAME) as temporary, open(temporary, "wb") as file:
            np.save(file, figures)


def read_figure(folder: Place, parts: Sequence[Place], name: str, packs: int) -> np.ndarray:
    """One of `FIGURES` for each pack, int64 `(packs,)`; from the parts where the plan is older than `figures.npy`."""
    try:
        # Mapped: the processes of a machine share what they read of it.
        figures = map_array(folder / FIGURES_NAME)
    except FileNotFoundError:
        return read_column(parts, name).astype(np.int64)
    if figures.shape != (len(FIGURES), packs):
        raise ValueError(f"{folder / FIGURES_NAME} is of another plan than {PLAN_NAME} beside it: delete it")
    return figures[FIGURES.index(name)].astype(np.int64)


def read_column(parts: Sequence[Place], name: str) -> np.ndarray:
    """A column of all parts, one after the other."""
    # Three times as fast as read_table: a part has many small row groups.
    tables = (pq.ParquetFile(arrow_source(part)).read(columns=[name], use_threads=False) for part in parts)
    return np.concatenate([table[name].to_numpy() for table in tables])


def read_plan(folder: Place) -> dict[str, Any]:
    """The content of `plan.json`; a `ValueError` if it is not there or of a version that this code does not know."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}; a folder that `open-qwen2vl pack DATA --output FOLDER` wrote is needed")
    try:
        plan = json.loads((folder / PLAN_NAME).read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {PLAN_NAME}: plan not finished; run open-qwen2vl pack again") from None
    if plan.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder / PLAN_NAME} has format version {plan.get('format_version')}; this code reads {FORMAT_VERSION}: "
            f"delete {folder} and plan again with the same command"
        )
    return plan


def _write_table(path: Place, table: pa.Table) -> None:
    with renamed_when_whole(path) as temporary:
        # Nobody searches by value; without statistics a footer, which is read to get at any pack, is half the size.
        pq.write_table(
            table, temporary, row_group_size=PACKS_PER_ROW_GROUP, compression="zstd", write_statistics=False
        )
