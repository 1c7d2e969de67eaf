"""The kinds of files that packs are planned from: how each is recognised, cut, planned and read.

    .tar             captions: image and text beside each other; or interleaved documents: a json and its images.
                     Several tars make a group
    .json, .jsonl    conversations of LLaVA's or of TRL's form, or interleaved documents; a file has many groups
    .parquet, .arrow rows of a Hugging Face data set: conversations, interleaved documents or captions

What a file's suffix leaves open its first records or its columns tell. A plan is made from one kind; a mixture joins
plans.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ...processing.sample_error import SampleError
from ..packing.plan_files import Group, GroupDocuments
from ..storage.hub_files import SCHEME, download_files
from ..storage.json_records import cut_records, read_record, record_spans
from ..storage.tables import TEXT_COLUMNS, column_names, cut_rows, find_tables
from ..storage.tars import find_shards, list_files, read_member, split_member_name
from .caption_rows import CaptionRowReader, caption_row_documents, find_caption_column
from .captions import CaptionReader, caption_documents
from .conversations import ConversationReader, conversation_documents
from .interleaved import MAX_DOCUMENT_BYTES, InterleavedReader, interleaved_documents
from .interleaved_records import is_interleaved

LOOKED_AT = 64  # members of a tar, or records of a file, among which one tells what the file is

_JSON, _TABLES = (".json", ".jsonl"), (".parquet", ".arrow")


class SourceKind(NamedTuple):
    """A kind of files.

    Attributes:
        suffixes (`tuple[str, ...]`): what its files' names end in.
        text_format (`str`): `"caption"`, `"conversation"` or `"interleaved"`.
        cut (`Callable`, *optional*): from a path and a number of records to the ranges of a file's groups; without it
            a group is made of whole files.
        plan (`Callable`): from a [`Group`] and a tokenizer to its [`GroupDocuments`].
        reader (`Callable`): from folder, plan and processor to an object whose `read` takes a document of the plan.
        images_elsewhere (`bool`): whether its images may be in folders and archives of their own.
    """

    suffixes: tuple[str, ...]
    text_format: str
    cut: Callable[[Path, int], list[tuple[int, int]]] | None
    plan: Callable[[Group, PreTrainedTokenizerBase], GroupDocuments]
    reader: Callable[[Path, dict[str, Any], Any], Any]
    images_elsewhere: bool = True


KINDS = (
    SourceKind((".tar",), "caption", None, caption_documents, CaptionReader, images_elsewhere=False),
    SourceKind(_TABLES, "caption", cut_rows, caption_row_documents, CaptionRowReader),
    SourceKind(_JSON, "conversation", cut_records, conversation_documents, ConversationReader),
    SourceKind(_TABLES, "conversation", cut_rows, conversation_documents, ConversationReader),
    SourceKind((".tar",), "interleaved", None, interleaved_documents, InterleavedReader),
    SourceKind(_JSON, "interleaved", cut_records, interleaved_documents, InterleavedReader),
    SourceKind(_TABLES, "interleaved", cut_rows, interleaved_documents, InterleavedReader),
)


def find_sources(paths: Iterable[str | Path]) -> list[Path]:
    """The files that the given paths stand for.

    Args:
        paths (`Iterable[str | Path]`): files, folders that stand for their `*.tar`, for a data set saved by
            `Dataset.save_to_disk`, for their `*.parquet`, or for their `*.jsonl`; and `hf://datasets/...`, which is
            downloaded.

    Returns:
        `list[Path]`: the files in the order given.

    Raises:
        ValueError: if there are none, or a path does not exist, or a file is named twice, or a folder has several
            splits.
    """
    found: list[Path] = []
    for path in paths:
        if str(path).startswith(SCHEME):
            found += download_files(str(path))
            continue
        path, others = Path(path), []
        if path.is_dir() and not any(path.glob("*.tar")):
            others = find_tables(path) or sorted(path.glob("*.jsonl"))
        found += others or [path]  # a folder of tars, or of nothing, is left to find_shards
    return find_shards(found)


def source_kind(paths: Sequence[str | Path], caption_column: str | None = None) -> SourceKind:
    """The kind of some files.

    Args:
        paths (`Sequence[str | Path]`): at least one file.
        caption_column (`str`, *optional*): the column of tables that has captions.

    Returns:
        [`SourceKind`].

    Raises:
        ValueError: for a file of no kind, or files of several.
    """
    first, *others = (_kind(os.fspath(path), caption_column) for path in paths)
    for path, kind in zip(paths[1:], others, strict=True):
        if kind is not first:
            raise ValueError(f"{path} and {paths[0]} are of different kinds: plan them apart and mix the plans")
    return first


def planned_kind(plan: dict[str, Any]) -> SourceKind:
    """The kind of files that a plan was made from.

    Args:
        plan (`dict`): the content of `plan.json`, or a part's recipe.

    Returns:
        [`SourceKind`].
    """
    suffix = Path(plan["shards"][0]["path"]).suffix
    return next(kind for kind in KINDS if kind.text_format == plan["text_format"] and suffix in kind.suffixes)


def _kind(path: str, caption_column: str | None) -> SourceKind:
    suffix = Path(path).suffix
    if not any(suffix in kind.suffixes for kind in KINDS):
        raise ValueError(f"{path}: packs are planned from files that end in .tar, {', '.join(_JSON + _TABLES)}")
    if suffix == ".tar":
        text_format = "interleaved" if any(map(is_interleaved, _first_of_tar(path))) else "caption"
    elif suffix in _JSON:
        text_format = "interleaved" if any(map(is_interleaved, _first_of_json(path))) else "conversation"
    else:
        text_format = _format_of_table(path, caption_column)
    if caption_column is not None and suffix not in _TABLES:
        raise ValueError(f"{path}: --caption-column {caption_column} is for parquet and arrow files")
    return planned_kind({"text_format": text_format, "shards": [{"path": path}]})


def _first_of_tar(path: str) -> Iterator[Any]:
    """What stands in the first json members. What is damaged is counted when the tar is planned."""
    with open(path, "rb", buffering=0) as file, contextlib.suppress(SampleError):
        for name, offset, size in islice(list_files(path), LOOKED_AT):
            named = split_member_name(name)
            if named and named[1] == "json" and size <= MAX_DOCUMENT_BYTES:
                with contextlib.suppress(ValueError, RecursionError):
                    yield json.loads(read_member(file.fileno(), name, offset, size))


def _first_of_json(path: str) -> Iterator[Any]:
    with open(path, "rb", buffering=0) as file:
        for offset, size in islice(record_spans(path, 0, os.path.getsize(path)), LOOKED_AT):
            with contextlib.suppress(SampleError):
                yield read_record(file.fileno(), offset, size, MAX_DOCUMENT_BYTES)


def _format_of_table(path: str, caption_column: str | None) -> str:
    names = column_names(path)
    if caption_column is not None:
        if find_caption_column(names, caption_column) is None:
            raise ValueError(
                f"{path}: no columns image and {caption_column} (--caption-column) among {', '.join(names)}"
            )
        return "caption"
    if set(TEXT_COLUMNS) & set(names):
        return "conversation"
    if is_interleaved(names) and "images" in names:
        return "interleaved"
    if find_caption_column(names):
        return "caption"
    raise ValueError(
        f"{path}: no column {' or '.join(TEXT_COLUMNS)} among {', '.join(names)}, nor texts and images of documents, "
        "nor image and caption of pairs (--caption-column)"
    )
