"""The files of a plan: what stands in them and how they are written.

    plan.json              options and fingerprints, the totals
    shards.arrow           the files that it was made from, as `describe_shard` tells them
    parts.npy              packs of all parts up to each, itself included: int64 (parts,)
    figures.npy            tokens, images, patches, labels of all packs: int32 (4, packs)
    part-00000.arrow       a pack in each row: tokens, images, patches, labels; documents, and where each is
    skipped-00000.parquet  a sample left out in each row: file, key, reason, detail

To start, a run reads plan.json and parts.npy and maps the files and the figures, however many there are; for a pack it
opens one part. It needs one row at a time and in any order, hence small batches, and a format that opens in 60
microseconds where parquet takes 1,200. Every file is written under another name and renamed when it is whole.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...files import renamed_when_whole, write_text
from ...places import Place, arrow_source, is_remote, place
from ...transfers import local_copy
from ..documents.documents import Skipped
from ..documents.items import Document
from ..storage.open_files import map_array

PLAN_NAME, SHARDS_NAME, PARTS_NAME, FIGURES_NAME = "plan.json", "shards.arrow", "parts.npy", "figures.npy"
FIGURES = ("tokens", "images", "patches", "labels")  # of a pack; columns of a part, rows of `figures.npy`
FORMAT_VERSION = 4
PACKS_PER_BATCH = 16
_SHARDS_PER_BATCH = 4096
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


def part_name(number: int) -> str:
    """The name of a part."""
    return f"part-{number:05d}.arrow"


def write_part(path: Place, table: pa.Table, metadata: dict[str, Any]) -> None:
    """Write a part with what it was made from."""
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    _write_arrow(path, table, "zstd", PACKS_PER_BATCH)


class Part:
    """An open part; a `ValueError` if it is none."""

    def __init__(self, path: Place):
        # Not mapped: to touch what is gone from a map would end the process.
        self._file, self._path = arrow_source(path) if is_remote(path) else pa.OSFile(str(path)), path
        self._documents = self._open(len(FIGURES))

    def _open(self, *columns: int) -> pa.RecordBatchFileReader:
        try:
            return pa.ipc.open_file(self._file, options=pa.ipc.IpcReadOptions(included_fields=list(columns)))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self._path}: not a part of a plan; delete it") from error

    @property
    def metadata(self) -> dict[str, Any]:
        """What it was made from."""
        try:
            return json.loads(self._documents.schema.metadata[_METADATA_KEY])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self._path}: not a part of a plan; delete it") from error

    def documents(self, batch: int) -> pa.ListArray:
        """The documents of the packs of a batch."""
        return self._documents.get_batch(batch).column(0)

    def figures(self) -> np.ndarray:
        """`FIGURES` of its packs: int32 `(4, packs)`."""
        table = self._open(*range(len(FIGURES))).read_all()
        return np.stack([table[name].to_numpy().astype(np.int32) for name in FIGURES])

    def close(self) -> None:
        """Close its file."""
        self._file.close()


def read_part_metadata(path: Place) -> dict[str, Any]:
    """What a part was made from, as given to [`write_part`]; a `ValueError` if it is no part of a plan."""
    with contextlib.closing(Part(path)) as part:
        return part.metadata


def read_part_figures(path: Place) -> np.ndarray:
    """`FIGURES` of the packs of a part: int32 `(4, packs)`."""
    with contextlib.closing(Part(path)) as part:
        return part.figures()


def write_skipped(path: Place, rows: list[Skipped]) -> None:
    """Write the list of the samples that a part leaves out."""
    columns = zip(*rows, strict=True) if rows else [[]] * len(_SKIPPED)
    table = pa.table([pa.array(column, pa.string()) for column in columns], schema=_SKIPPED)
    with renamed_when_whole(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_statistics=False)


class Shards(Sequence):
    """The files that a plan was made from, as `describe_shard` tells them: a mapped table, read where it is asked."""

    def __init__(self, path: Place):
        self._path = path
        self._table = _read_arrow(path)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> dict[str, Any]:
        (row,) = self._table.slice(range(len(self))[number], 1).to_pylist()
        return _without_nulls(row)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._table.to_batches():
            yield from map(_without_nulls, batch.to_pylist())

    def __reduce__(self) -> tuple:
        return Shards, (self._path,)


def write_plan(
    folder: Place, plan: dict[str, Any], shards: Sequence[dict[str, Any]], figures: Sequence[np.ndarray]
) -> None:
    """Write what stands beside the parts of a plan, `plan.json` last; `figures` are those of each part.

    A file that is there already is left alone.
    """
    names = dict.fromkeys(name for shard in shards for name in shard)
    table = pa.table({name: [shard.get(name) for shard in shards] for name in names})
    if not (folder / SHARDS_NAME).exists() or not _read_arrow(folder / SHARDS_NAME).equals(table):
        _write_arrow(folder / SHARDS_NAME, table, None, _SHARDS_PER_BATCH)
    _write_array(folder / PARTS_NAME, np.cumsum([own.shape[1] for own in figures], dtype=np.int64))
    _write_array(folder / FIGURES_NAME, np.concatenate(figures, axis=1))
    places = [(os.path.basename(shard["path"]), shard.get("size")) for shard in shards]
    plan = {**plan, "content": hashlib.sha256(json.dumps(places).encode()).hexdigest()}
    path, text = folder / PLAN_NAME, json.dumps(plan, indent=1, sort_keys=True) + "\n"
    if not path.exists() or path.read_text(encoding="utf8") != text:
        write_text(path, text)


def read_part_ends(folder: Place, plan: dict[str, Any]) -> np.ndarray:
    """Packs of all parts up to each, itself included: int64 `(parts,)`."""
    ends = map_array(folder / PARTS_NAME)
    if ends.shape != (plan["totals"]["parts"],) or ends[-1] != plan["totals"]["packs"]:
        raise ValueError(f"{folder / PARTS_NAME} is of another plan than {PLAN_NAME} beside it: delete it")
    return ends


def read_figure(folder: Place, plan: dict[str, Any], name: str) -> np.ndarray:
    """One of `FIGURES` for each pack: int32 `(packs,)`, mapped, so that the processes of a machine share it."""
    figures = map_array(folder / FIGURES_NAME)
    if figures.shape != (len(FIGURES), plan["totals"]["packs"]):
        raise ValueError(f"{folder / FIGURES_NAME} is of another plan than {PLAN_NAME} beside it: delete it")
    return figures[FIGURES.index(name)]


def read_plan(folder: str | Place) -> dict[str, Any]:
    """The content of `plan.json`, with the files of the plan as `shards`.

    A `ValueError` if it is not there or of a version that this code does not know.
    """
    folder = place(folder)
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
    return {**plan, "shards": Shards(folder / SHARDS_NAME)}


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _read_arrow(path: Place) -> pa.Table:
    with local_copy(path) as copy:
        return pa.ipc.open_file(pa.memory_map(str(copy))).read_all()


def _write_arrow(path: Place, table: pa.Table, compression: str | None, rows: int) -> None:
    """Write a table in batches of so many rows."""
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with renamed_when_whole(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        with pa.ipc.new_file(file, table.schema, options=options) as writer:
            writer.write_table(table.combine_chunks(), max_chunksize=rows)


def _write_array(path: Place, array: np.ndarray) -> None:
    if not path.exists() or not np.array_equal(map_array(path), array):
        with renamed_when_whole(path) as temporary, open(temporary, "wb") as file:
            np.save(file, array)
