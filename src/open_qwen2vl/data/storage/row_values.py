"""Rows of a table as Python has them: validated, of bounded length, and with the JSON in their cells decoded."""

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...processing.conversation_records import BRANCHES, TURNS
from ...processing.sample_error import SampleError
from .tars import MAX_TEXT_BYTES


def row_values(rows: pa.Table) -> list[dict[str, Any] | SampleError]:
    """Rows as Python has them, JSON in them decoded; those that are damaged or far too long are an error.

    A single such row raises it.
    """
    try:
        check_structure(rows)
        is_whole = max((_longest(column) for column in rows.columns), default=0) <= MAX_TEXT_BYTES
        if is_whole:
            return _decoded(rows)
    except (pa.ArrowException, UnicodeDecodeError, ValueError, RecursionError) as error:
        if len(rows) == 1:
            raise _row_error(error) from error
    if len(rows) == 1:
        raise SampleError("record_too_large", f"a text of a row has more than {MAX_TEXT_BYTES:,} bytes")
    found: list[Any] = []
    for number in range(len(rows)):
        try:
            found += row_values(rows.slice(number, 1))
        except SampleError as error:
            found.append(error)
    return found


def check_structure(rows: pa.Table) -> None:
    """Raise ArrowInvalid where values of rows point outside of what is there."""
    # Not `validate(full=True)` of a column: it validates whole children, and one text that is no UTF-8 fails them all.
    rows.validate()
    for column in rows.columns:
        for chunk in column.chunks:
            _check_array(chunk)


def _check_array(array: pa.Array) -> None:
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        _check_array(array.storage)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        array.view(pa.binary() if pa.types.is_string(kind) else pa.large_binary()).validate(full=True)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        own = pa.ListArray if pa.types.is_list(kind) else pa.LargeListArray
        ends = array.offsets
        own.from_arrays(ends, pa.nulls(len(array.values))).validate(full=True)
        first, last = ends[0].as_py(), ends[-1].as_py()
        _check_array(array.values.slice(first, last - first))
    elif pa.types.is_struct(kind):
        for number in range(kind.num_fields):
            _check_array(array.field(number))
    elif pa.types.is_dictionary(kind):
        pa.DictionaryArray.from_arrays(array.indices, pa.nulls(len(array.dictionary)), safe=False).validate(full=True)
        _check_array(array.dictionary)
    else:
        array.validate(full=True)


def _row_error(error: Exception) -> SampleError:
    if isinstance(error, SampleError):
        return error
    if isinstance(error, json.JSONDecodeError | RecursionError):
        return SampleError("invalid_json", f"a field of a row: {error}")
    if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
        return SampleError("bad_encoding", f"a text of a row is no UTF-8: {error}")
    return SampleError("corrupt_table", f"a row: {error}")


def _longest(column: pa.Array | pa.ChunkedArray) -> int:
    """Bytes of the longest text in a column at any depth, without writing out what is stored once."""
    if isinstance(column, pa.ChunkedArray):
        return max(map(_longest, column.chunks), default=0)
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return _longest(column.storage)
    if pa.types.is_dictionary(kind):
        used = column.indices.unique().drop_null()
        return _longest(column.dictionary.take(used))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pc.max(pc.binary_length(column)).as_py() or 0
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _longest(column.flatten())
    if pa.types.is_struct(kind):
        return max((_longest(child) for child in column.flatten()), default=0)
    return 0


def _decoded(rows: pa.Table) -> list[dict[str, Any]]:
    decoders = {field.name: decoder for field in rows.schema if (decoder := _json_decoder(field))}
    values = rows.to_pylist()
    for row in values:
        _drop_nulls_of_tools(row)
        for name, decode in decoders.items():
            row[name] = decode(row[name])
    return values


def _drop_nulls_of_tools(row: dict[str, Any]) -> None:
    """A struct has the arguments of all functions in its file, null where another function's; JSON text is kept."""
    if "tools" in row:
        row["tools"] = _without_nulls(row["tools"])
    branches = row.get(BRANCHES)
    for turns in (*(row.get(name) for name in TURNS), *(branches if isinstance(branches, list) else ())):
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict) and turn.get("tool_calls"):
                turn["tool_calls"] = _without_nulls(turn["tool_calls"])


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _json_decoder(field: pa.Field) -> Callable[[Any], Any] | None:
    """What decodes the JSON in a field's values, as `datasets` stores values of mixed types; None if there is none."""
    kind = field.type
    extension = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()
    if "arrow.json" in (extension, getattr(kind, "extension_name", "")):
        return lambda text: None if text is None else json.loads(text)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _json_decoder(kind.value_field)
        return inner and (lambda values: values and [inner(value) for value in values])
    if pa.types.is_struct(kind):
        children = {child.name: decoder for child in kind if (decoder := _json_decoder(child))}
        return (
            (lambda value: value and {k: children[k](v) if k in children else v for k, v in value.items()})
            if (children)
            else None
        )
    return None
