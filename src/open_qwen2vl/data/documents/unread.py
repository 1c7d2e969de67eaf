"""Which fields of records nobody reads: what is left out is said, for a name may mean text that should be trained."""

import logging
from collections.abc import Iterator, Mapping

import pyarrow as pa

from ...places import Place
from ...processing.conversation_records import FLAGS, UNREAD
from ..storage.csv_records import csv_header
from ..storage.tables import COLUMNS, column_types
from .forms import BRANCHES, IMAGE_ID, TURNS
from .records import CSV, JSON, TABLES
from .sources import SourceKind, first_of_json
from .texts import image_field

logger = logging.getLogger(__name__)

_READ = {
    "conversation": (*COLUMNS, TURNS, BRANCHES, IMAGE_ID, "uid"),
    "interleaved": ("id", "uid", "texts", "images", "text_list", "image_info"),
}
_TURNS = ("messages", "conversations", TURNS)
_NAMES = ("tool_calls", "tool_call_id", "name")  # the latter two name the call that a result is of
_READ_OF_PARTS = ("type", "text", "image", "image_url", "video", "video_url", "path", "url", "label", "box")
_READ_OF_TURNS = ("role", "from", "content", "value", "user", "assistant", "system", *_NAMES, *FLAGS, *UNREAD)


def warn_of_unread_fields(path: str | Place, kind: SourceKind) -> None:
    """Name the fields of a file's records, of their turns, and in json of parts of content, that are not read."""
    fields, turns, parts = _fields(str(path), kind)
    own = (kind.caption_column, image_field(fields, kind.text_format == "caption"))
    read = _READ.get(kind.text_format, ("id", "uid", *own))
    found = [name for name in fields if name not in read]
    if kind.text_format == "conversation":
        found += [f"{name} of a turn" for name in turns if name not in _READ_OF_TURNS]
        found += [f"{name} of a part" for name in parts if name not in _READ_OF_PARTS]
    if found:
        logger.warning("%s: these fields are not read: %s", path, ", ".join(found))


def _fields(path: str, kind: SourceKind) -> tuple[dict[str, None], dict[str, None], dict[str, None]]:
    """Names of a file's first records, of the turns in them, and of the parts of their content."""
    fields, turns, parts = {}, {}, {}
    if kind.suffixes == TABLES:
        types = column_types(path)
        fields = dict.fromkeys(types)
        structs = [getattr(types.get(name), "value_type", None) for name in _TURNS]
        turns = {one.name: None for struct in structs if isinstance(struct, pa.StructType) for one in struct}
    elif kind.suffixes == CSV:
        fields = dict.fromkeys(csv_header(path))
    elif kind.suffixes == JSON:
        for record in first_of_json(path):
            if isinstance(record, Mapping):
                fields |= dict.fromkeys(name for name, value in record.items() if value not in (None, "", []))
                turns |= dict.fromkeys(_keys_of_turns(record))
                parts |= dict.fromkeys(_keys_of_parts(record))
    return fields, turns, parts


def _keys_of_turns(record: Mapping) -> Iterator[str]:
    for turn in _turns_of(record):
        yield from (key for key, value in turn.items() if value not in (None, "", []))


def _keys_of_parts(record: Mapping) -> Iterator[str]:
    for turn in _turns_of(record):
        content = turn.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping):
                yield from (key for key, value in part.items() if value not in (None, "", []))


def _turns_of(record: Mapping) -> Iterator[Mapping]:
    branches = record.get(BRANCHES)
    lists = [*(record.get(name) for name in _TURNS), *(branches if isinstance(branches, list) else ())]
    for turns in lists:
        yield from (turn for turn in turns if isinstance(turn, Mapping)) if isinstance(turns, list) else ()
