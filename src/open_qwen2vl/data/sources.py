"""The kinds of files that packs are planned from: how each is recognised, cut, planned and read.

    .tar             captions: image and text beside each other; several tars make a group
    .json, .jsonl    conversations of LLaVA's or of TRL's form, images in folders or archives; a file has many groups
    .parquet, .arrow conversations of a Hugging Face data set, images in the rows or by path

A plan is made from one kind; a mixture joins plans.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .captions import CaptionReader, caption_documents
from .conversations import ConversationReader, conversation_documents
from .json_records import cut_records
from .plan_files import Group, GroupDocuments
from .shards import find_shards
from .table_rows import cut_rows, find_tables


class SourceKind(NamedTuple):
    """A kind of files.

    Attributes:
        suffixes (`tuple[str, ...]`): what its files' names end in.
        text_format (`str`): `"caption"` or `"conversation"`.
        cut (`Callable`, *optional*): from a path and a number of records to the ranges of a file's groups; without it
            a group is made of whole files.
        plan (`Callable`): from a [`Group`] and a tokenizer to its [`GroupDocuments`].
        reader (`Callable`): from folder, plan and processor to an object whose `read` takes a document of the plan.
    """

    suffixes: tuple[str, ...]
    text_format: str
    cut: Callable[[Path, int], list[tuple[int, int]]] | None
    plan: Callable[[Group, PreTrainedTokenizerBase], GroupDocuments]
    reader: Callable[[Path, dict[str, Any], Any], Any]


KINDS = (
    SourceKind((".tar",), "caption", None, caption_documents, CaptionReader),
    SourceKind((".json", ".jsonl"), "conversation", cut_records, conversation_documents, ConversationReader),
    SourceKind((".parquet", ".arrow"), "conversation", cut_rows, conversation_documents, ConversationReader),
)


def find_sources(paths: Iterable[str | Path]) -> list[Path]:
    """The files that the given paths stand for.

    Args:
        paths (`Iterable[str | Path]`): files, and folders that stand for their `*.tar`, for a data set saved by
            `Dataset.save_to_disk`, or for their `*.parquet`.

    Returns:
        `list[Path]`: the files in the order given.

    Raises:
        ValueError: if there are none, or a path does not exist, or a file is named twice, or a folder has several
            splits.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        tables = find_tables(path) if path.is_dir() and not any(path.glob("*.tar")) else []
        found += tables or [path]  # a folder of tars, or of nothing, is left to find_shards
    return find_shards(found)


def source_kind(paths: Sequence[str | Path]) -> SourceKind:
    """The kind of some files.

    Args:
        paths (`Sequence[str | Path]`): at least one file.

    Returns:
        [`SourceKind`].

    Raises:
        ValueError: for a file of no kind, or files of several.
    """
    first, *others = (_kind(path) for path in paths)
    for path, kind in zip(paths[1:], others, strict=True):
        if kind is not first:
            raise ValueError(f"{path} and {paths[0]} are of different kinds: plan them apart and mix the plans")
    return first


def _kind(path: str | Path) -> SourceKind:
    for kind in KINDS:
        if Path(path).suffix in kind.suffixes:
            return kind
    known = ", ".join(suffix for kind in KINDS for suffix in kind.suffixes)
    raise ValueError(f"{path}: packs are planned from files that end in {known}")
