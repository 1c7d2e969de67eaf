"""The files of a plan: what stands in them, how they are written and where their tars are.

    plan.json              options and fingerprints, the files that it was made from, the parts, the totals
    part-00000.parquet     a pack in each row: tokens, images, documents with the places of what they are made of
    skipped-00000.parquet  a sample left out in each row: tar (or other file), key, reason

A reader needs one row at a time and in any order, hence small row groups. Every file is written under another name and
renamed when it is whole.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...files import describe_shard as describe_shard
from ...files import renamed_when_whole, write_text
from ...files import shard_path as shard_path
from ..storage.tars import IMAGE_EXTENSIONS

PLAN_NAME = "plan.json"
FORMAT_VERSION = 1
PACKS_PER_ROW_GROUP = 64
_METADATA_KEY = b"open_qwen2vl"

_MEMBER = pa.struct([("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
_PLACE = pa.struct([("root", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())])
_DOCUMENT = pa.struct(
    [
        ("shard", pa.int32()),  # index into the plan's list of files
        ("key", pa.string()),
        ("uid", pa.string()),
        ("members", pa.list_(_MEMBER)),  # of a caption in a tar: the image, the text; else the record, its entries
        ("tokens", pa.int32()),
        ("images", pa.list_(_PLACE)),  # of records, in the order of the text; null: the record has the bytes
    ]
)
_SKIPPED = pa.schema([("tar", pa.string()), ("key", pa.string()), ("reason", pa.string())])


class Document(NamedTuple):
    """A document of a plan.

    Attributes:
        shard (`int`): index of its file in the plan's list.
        key (`str`): key of its sample.
        uid (`str`): 32 hex digits.
        members (`list[tuple[str, int, int]]`): extension, byte offset and size: of a caption in a tar the image, then
            the text; else its record (of a table's row: its number and 0), and of an interleaved document then
            `"entries"`, the first of them and their number.
        tokens (`int`): positions that it takes.
        images (`list[tuple[int, int, int] | None]`): images outside of the record, in the order of the text: which of
            the plan's image folders and archives (-1: the document's own tar), byte offset and size; `None` for one
            whose bytes the record holds.
    """

    shard: int
    key: str
    uid: str
    members: list[tuple[str, int, int]]
    tokens: int
    images: Sequence[tuple[int, int, int] | None] = ()

    @property
    def num_images(self) -> int:
        """Images in its text."""
        return len(self.images) + sum(ext in IMAGE_EXTENSIONS for ext, _, _ in self.members)


class Group(NamedTuple):
    """What becomes one part of a plan.

    Attributes:
        folder (`Path`): folder of the plan.
        shards (`range`): indices of its files in the plan's list.
        recipe (`dict`): all that its part depends on: the plan's options, `shards` as described by [`describe_shard`]
            and, where a file has several groups, `range`: the first byte or row of this one and that behind it.
    """

    folder: Path
    shards: range
    recipe: dict[str, Any]


class GroupDocuments(NamedTuple):
    """The documents of a group and what was left out.

    Attributes:
        documents (`list[Document]`): in the order of the files.
        skipped (`list[tuple[str, str, str]]`): file as in the plan, key and reason.
        ignored_members (`int`): members that belong to no sample, as directories.
    """

    documents: list[Document]
    skipped: list[tuple[str, str, str]]
    ignored_members: int


def packs_table(documents: list[Document], pack_of_document: np.ndarray) -> pa.Table:
    """Rows of a part.

    Args:
        documents (`list[Document]`): documents of one group of tars.
        pack_of_document (`np.ndarray`): the pack of each, numbered from 0 without a gap.

    Returns:
        `pa.Table`: one row for each pack, its documents in the order given.
    """
    order = np.argsort(pack_of_document, kind="stable")
    counts = np.bincount(pack_of_document)
    images = [document.num_images for document in documents]
    columns = {
        name: np.bincount(pack_of_document, weights=values).astype(np.int32)
        for name, values in (("tokens", [document.tokens for document in documents]), ("images", images))
    }
    rows = pa.ListArray.from_arrays(
        np.concatenate([[0], counts.cumsum()]).astype(np.int32),
        pa.array([documents[i] for i in order], type=_DOCUMENT),
    )
    return pa.table({**columns, "documents": rows})


def write_part(path: Path, table: pa.Table, metadata: dict[str, Any]) -> None:
    """Write a part.

    Args:
        path (`Path`): its file.
        table (`pa.Table`): from [`packs_table`].
        metadata (`dict`): kept in the part and returned by [`read_part_metadata`].
    """
    _write_table(path, table.replace_schema_metadata({_METADATA_KEY: json.dumps(metadata, sort_keys=True)}))


def read_part_metadata(path: Path) -> dict[str, Any]:
    """What a part was made from.

    Args:
        path (`Path`): its file.

    Returns:
        `dict`: as given to [`write_part`].

    Raises:
        ValueError: if the file is no part of a plan.
    """
    try:
        return json.loads(pq.read_schema(path).metadata[_METADATA_KEY])
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a part of a plan; delete it") from error


def write_skipped(path: Path, rows: list[tuple[str, str, str]]) -> None:
    """Write the list of the samples that a part leaves out.

    Args:
        path (`Path`): its file.
        rows (`list[tuple[str, str, str]]`): tar, key and reason.
    """
    columns = zip(*rows, strict=True) if rows else [[], [], []]
    _write_table(path, pa.table([pa.array(column, pa.string()) for column in columns], schema=_SKIPPED))


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write `plan.json`, unless it already stands there.

    Args:
        folder (`Path`): folder of the plan.
        plan (`dict`): its content.
    """
    path, text = folder / PLAN_NAME, json.dumps(plan, indent=1, sort_keys=True) + "\n"
    if not path.exists() or path.read_text(encoding="utf8") != text:
        write_text(path, text)


def read_plan(folder: Path) -> dict[str, Any]:
    """Read `plan.json`.

    Args:
        folder (`Path`): folder of the plan.

    Returns:
        `dict`: its content.

    Raises:
        ValueError: if it is not there or of a version that this code does not know.
    """
    try:
        plan = json.loads((folder / PLAN_NAME).read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {PLAN_NAME}: plan not finished; run open-qwen2vl pack again") from None
    if plan.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder / PLAN_NAME} has format version {plan.get('format_version')}; this code reads {FORMAT_VERSION}"
        )
    return plan


def _write_table(path: Path, table: pa.Table) -> None:
    with renamed_when_whole(path) as temporary:
        # Nobody searches by value; without statistics a footer, which is read to get at any pack, is half the size.
        pq.write_table(
            table, temporary, row_group_size=PACKS_PER_ROW_GROUP, compression="zstd", write_statistics=False
        )
