"""The files that packs are planned from: which container they are, which form their records have, how they are cut.

    .tar             image and text beside each other; or a json with texts and images. Several tars make a group
    .json, .jsonl, .csv, .parquet, .arrow         one file has many groups

The form is that of the first records, or of a table's columns. A plan is made from one kind of files and one form; a
mixture joins plans.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...places import Place, open_file, place, remote_errors_named
from ...processing.sample_error import SampleError
from ..storage.csv_records import csv_header, cut_csv
from ..storage.hub_files import SCHEME, find_files
from ..storage.json_records import cut_records, read_record, record_spans
from ..storage.tables import TEXT_COLUMNS, column_names, column_types, cut_rows, find_tables
from ..storage.tar_index import LOOKED_AT, index_fields
from ..storage.tars import find_shards, list_files, read_member, split_member_name
from .forms import BRANCHES, TURNS, columns_of, is_turns
from .records import CSV, JSON, MAX_DOCUMENT_BYTES, TABLES, TAR
from .texts import CAPTION_FIELDS, IMAGE_FIELD, VIDEO_FIELD, caption_field, image_field, is_interleaved

CONTAINERS = (TAR, JSON, CSV, TABLES)
# The most telling first: a record of conversations or of documents may have a text beside them.
TEXT_FORMATS = ("conversation", "interleaved", "caption", "text")
KNOWN_FORMS = (
    "messages or conversations, branches of lists of turns, texts of user and assistant turns (FineVision, the "
    "Cauldron), texts and images of documents, image and caption of pairs (--caption-column), or a text"
)


class SourceKind(NamedTuple):
    """What some files have in common."""

    suffixes: tuple[str, ...]  # of their container, one of `CONTAINERS`
    text_format: str  # one of `TEXT_FORMATS`
    caption_column: str | None = None  # of captions and texts outside of tars, the field that has them

    @property
    def images_elsewhere(self) -> bool:
        """Whether images may be in folders and archives of their own."""
        return not (self.suffixes == TAR and self.text_format in ("caption", "text"))

    def cut(self, path: str | Place, number: int) -> list[tuple[int, int]]:
        """The ranges of a file's groups of `number` records; not for tars, which are whole."""
        if self.suffixes == TABLES:
            columns = columns_of({"text_format": self.text_format, "caption_column": self.caption_column})
            return cut_rows(path, number, columns)
        return (cut_csv if self.suffixes == CSV else cut_records)(path, number)


def find_sources(paths: Iterable[str | Place]) -> list[Place]:
    """The files that the given paths stand for.

    Args:
        paths (`Iterable[str | Place]`): files, folders that stand for their `*.tar`, for a data set saved by
            `Dataset.save_to_disk`, for their `*.parquet`, or for their `*.jsonl`; and `hf://datasets/...`, of
            the newest commit.

    Returns:
        `list[Place]`: the files in the order given.

    Raises:
        ValueError: if there are none, or a path does not exist, or a file is named twice, or a folder has several
            splits.
    """
    found: list[Place] = []
    for path in paths:
        if str(path).startswith(SCHEME):
            found += find_files(str(path))
            continue
        with remote_errors_named(path):
            path, others = place(path), []
            if path.is_dir() and not any(path.glob("*.tar")):
                others = find_tables(path) or sorted(path.glob("*.jsonl"))
        found += others or [path]  # a folder of tars, or of nothing, is left to find_shards
    return find_shards(found)


def source_kind(
    paths: Sequence[str | Place], caption_column: str | None = None, has_images: bool = False
) -> SourceKind:
    """The kind of some files, perhaps with images elsewhere; a `ValueError` for a file of no kind, or of several."""
    first, *others = (_kind(str(path), caption_column, has_images) for path in paths)
    for path, kind in zip(paths[1:], others, strict=True):
        if kind == first:
            continue
        columns = (first.caption_column, kind.caption_column)
        if kind[:2] == first[:2] and None not in columns:
            raise ValueError(f"captions are in the columns {' and '.join(columns)} of different files: name one "
                             f"(--caption-column), or plan {paths[0]} and {path} apart")  # fmt: skip
        raise ValueError(f"{path} and {paths[0]} are of different kinds: plan them apart and mix the plans")
    return first


def _kind(path: str, caption_column: str | None, has_images: bool) -> SourceKind:
    suffix = Path(path).suffix
    container = next((suffixes for suffixes in CONTAINERS if suffix in suffixes), None)
    if container is None:
        known = ", ".join(suffix for suffixes in CONTAINERS for suffix in suffixes)
        raise ValueError(f"{path}: packs are planned from files that end in {known}")
    if container == TAR:
        if caption_column is not None:
            raise ValueError(f"{path}: --caption-column {caption_column} is for tables, json and csv files")
        fields = index_fields(path)
        first = _first_of_tar(path) if fields is None else fields
        return SourceKind(TAR, "interleaved" if any(map(is_interleaved, first)) else "caption")
    if container == JSON:
        return _kind_of_json(path, caption_column, has_images)
    names, types = (csv_header(path), {}) if container == CSV else (column_names(path), column_types(path))
    text_format = _format(names, caption_column, _has_turns_type(types), has_images)
    if text_format is None:
        if caption_column is not None:
            raise ValueError(f"{path}: no columns {IMAGE_FIELD} and {caption_column} (--caption-column) among "
                             f"{', '.join(names)}")  # fmt: skip
        raise ValueError(f"{path}: no column {' or '.join(TEXT_COLUMNS)} among {', '.join(names)}, nor another form "
                         f"that is known: {KNOWN_FORMS}")  # fmt: skip
    if text_format == "text" and has_images:
        raise ValueError(f"{path}: --images is given, but no column names an image among {', '.join(names)}: "
                         f"call it {IMAGE_FIELD}")  # fmt: skip
    return _with_caption_column(path, container, text_format, names, caption_column)


def _kind_of_json(path: str, caption_column: str | None, has_images: bool) -> SourceKind:
    records = [record for record in first_of_json(path) if isinstance(record, Mapping)]
    formats = [_format(record, caption_column, _has_turns(record), has_images) for record in records]
    found = [name for name in TEXT_FORMATS if name in formats]
    if records and not found:
        raise ValueError(f"{path}: records of {', '.join(map(str, records[0]))} have no form that is known: "
                         f"{KNOWN_FORMS}")  # fmt: skip
    # Nothing but damaged records so far: any form counts them by their reasons.
    text_format = found[0] if found else "conversation"
    names: dict[str, None] = {}
    for record, own in zip(records, formats, strict=True):
        if own == text_format:
            names |= {name: None for name, value in record.items() if value not in (None, [])}
    return _with_caption_column(path, JSON, text_format, names, caption_column)


def _format(names: Any, caption_column: str | None, has_turns: bool, has_images: bool) -> str | None:
    """The form of a record with these fields, or of a table with these columns; None for one that is not known."""
    if caption_column is None:
        if set(TEXT_COLUMNS) & set(names) or has_turns:
            return "conversation"
        if is_interleaved(names):
            return "interleaved"
    field = caption_field(names, caption_column)
    if field is None:
        return None
    # A file of texts may have a path in each of its rows: that of an image stands beside a `caption`, or --images.
    return "caption" if image_field(names, has_images or field == CAPTION_FIELDS[0]) else "text"


def _with_caption_column(
    path: str, container: tuple[str, ...], text_format: str, names: Any, wanted: str | None
) -> SourceKind:
    """The kind of a file; captions whose images are nowhere are no texts, unless they are asked for by name."""
    column = caption_field(names, wanted) if text_format in ("caption", "text") else None
    if text_format == "text" and column == CAPTION_FIELDS[0] and wanted is None:
        raise ValueError(f"{path}: captions without a column {IMAGE_FIELD} among {', '.join(names)}: give the images' "
                         f"column that name, or plan the captions as texts (--caption-column {column})")  # fmt: skip
    lists = [name for name in ("images", "videos") if name in names]
    if text_format == "text" and lists and wanted is None:
        raise ValueError(f"{path}: texts with {' and '.join(lists)}, of which nobody knows the places: name the one "
                         f"of a caption ({IMAGE_FIELD} or {VIDEO_FIELD}), give conversations, or plan the texts alone "
                         f"(--caption-column {column})")  # fmt: skip
    return SourceKind(container, text_format, column)


def _has_turns(record: Mapping) -> bool:
    branches = record.get(BRANCHES)
    return is_turns(record.get(TURNS)) or isinstance(branches, list) and any(isinstance(one, list) for one in branches)


def _has_turns_type(types: Mapping[str, Any]) -> bool:
    turns = getattr(types.get(BRANCHES), "value_type", None)
    return is_turns_type(types.get(TURNS)) or getattr(turns, "value_type", None) is not None


def is_turns_type(arrow_type: Any) -> bool:
    """Whether a column of this type (`pa.DataType`, or None) holds turns of user and assistant."""
    value = getattr(arrow_type, "value_type", None)
    fields = [value.field(i).name for i in range(value.num_fields)] if value is not None else []
    return {"user", "assistant"} <= set(fields)


def _first_of_tar(path: str) -> Iterator[Any]:
    """What stands in the first json members. What is damaged is counted when the tar is planned."""
    with open_file(path, whole=True) as file, contextlib.suppress(SampleError):
        for name, offset, size in islice(list_files(path), LOOKED_AT):
            named = split_member_name(name)
            if named and named[1] == "json" and size <= MAX_DOCUMENT_BYTES:
                with contextlib.suppress(ValueError, RecursionError):
                    yield json.loads(read_member(file, name, offset, size))


def first_of_json(path: str) -> Iterator[Any]:
    """The first records of a file that can be parsed."""
    with open_file(path, whole=True) as file:
        for offset, size in islice(record_spans(path, 0, None), LOOKED_AT):
            with contextlib.suppress(SampleError):
                yield read_record(file, offset, size, MAX_DOCUMENT_BYTES)
