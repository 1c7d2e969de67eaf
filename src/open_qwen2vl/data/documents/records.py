"""Records one by one, whatever file they stand in, and the images that they name.

    json, jsonl      record ─ json_records.py  ┐
    parquet, arrow   row ─ tables.py       ┴► find_records (to plan), RecordReader (to read one again)

An image's reference is a path, which is looked up in folders and archives (image_files.py), or a dict that has the
bytes of the image itself beside its path or instead of one.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from ...processing.sample_error import SampleError
from ..storage.image_files import ImageFiles, Place
from ..storage.json_records import read_record, record_spans
from ..storage.open_files import Newest
from ..storage.tables import Columns, RowTable

BATCHES = 8  # decoded batches of tables that one process keeps
RECORD, ROW = "record", "row"  # what stands in place of an extension in a document's first member


class Found(NamedTuple):
    """A record and where it is.

    Attributes:
        place (`tuple[str, int, int]`): `"record"`, byte offset and size, or `"row"`, its number and 0.
        record (`Any`): parsed, or the [`SampleError`] that it could not be.
        position (`str`): names a record that has no id.
    """

    place: tuple[str, int, int]
    record: Any
    position: str

    @property
    def key(self) -> str:
        """The record's id, or its position where it has none."""
        name = self.record.get("id") if isinstance(self.record, dict) else None
        key = str(name) if isinstance(name, str | int) and name != "" else self.position
        return key.encode(errors="backslashreplace").decode()


def find_records(path: str, start: int, stop: int, columns: Columns, max_bytes: int | None = None) -> Iterator[Found]:
    """The records of a part of a file, images in rows without their bytes.

    Args:
        path (`str`): a file of JSON, or a table.
        start (`int`): the first byte, or row.
        stop (`int`): the byte or row behind the last.
        columns ([`Columns`]): of a table those that are read.
        max_bytes (`int`, *optional*): largest record of JSON that is read; as [`read_record`] where not given.

    Yields:
        [`Found`].

    Raises:
        OSError: if the file cannot be read.
    """
    if path.endswith((".json", ".jsonl")):
        yield from _find_in_json(path, record_spans(path, start, stop), max_bytes)
        return
    table = RowTable(path, columns)
    yield from (Found((ROW, number, 0), row, f"row {number}") for number, row in table.rows_to_plan(start, stop))
    table.close()


def _find_in_json(path: str, spans: Iterable[tuple[int, int]], max_bytes: int | None) -> Iterator[Found]:
    with open(path, "rb", buffering=0) as file:
        for offset, size in spans:
            try:
                record = read_record(file.fileno(), offset, size, max_bytes)
            except SampleError as error:
                record = error
            if record is not None:  # a blank line is no record
                yield Found((RECORD, offset, size), record, f"byte {offset}")


class RecordReader:
    """Records of a plan's files, for one process.

    Args:
        paths (`list[str]`): the plan's files.
        columns ([`Columns`]): of tables those that are read.
        max_bytes (`int`, *optional*): as for [`find_records`].
    """

    def __init__(self, paths: list[str], columns: Columns, max_bytes: int | None = None):
        self._max_bytes = max_bytes
        self._files = Newest(lambda shard: open(paths[shard], "rb", buffering=0))
        self._tables = Newest(lambda shard: RowTable(paths[shard], columns))
        self._batch = lru_cache(BATCHES)(lambda shard, batch: self._tables[shard].read_batch(batch))

    def read(self, document: dict[str, Any]) -> Any:
        """The record of a document.

        Args:
            document (`dict`): of a row of the plan; its first member is the record's place.

        Returns:
            `Any`: the parsed record, or the row as a dict, its images with their bytes.

        Raises:
            SampleError: if it cannot be read any more.
        """
        member = document["members"][0]
        if member["ext"] == ROW:
            batch, row = self._tables[document["shard"]].find(member["offset"])
            return self._batch(document["shard"], batch).slice(row, 1).to_pylist()[0]
        return read_record(self._files[document["shard"]].fileno(), member["offset"], member["size"], self._max_bytes)


def place_image(reference: Any, images: ImageFiles) -> Place | None:
    """Where an image is.

    Args:
        reference (`str | dict`): a path, or `path` and `bytes`.
        images ([`ImageFiles`]): where paths are looked up.

    Returns:
        [`Place`] or `None` if its bytes stand in the record.

    Raises:
        SampleError, ValueError: as [`ImageFiles.find`].
    """
    if isinstance(reference, dict) and reference.get("bytes") is not None:
        return None
    return images.find(_name(reference))


def read_image(reference: Any, place: dict[str, int] | None, images: ImageFiles) -> bytes:
    """The file of an image.

    Args:
        reference (`str | dict`): as given to [`place_image`], with the bytes of the image where they are in the
            record.
        place (`dict`, *optional*): what it returned, from the plan.
        images ([`ImageFiles`]): as given to it.

    Returns:
        `bytes`: the content of the image file.

    Raises:
        SampleError: `missing_image` if the record has no bytes, or as [`ImageFiles.read`].
    """
    if place is not None:
        return images.read(_name(reference), (place["root"], place["offset"], place["size"]))
    content = reference.get("bytes") if isinstance(reference, dict) else None
    if not content:
        raise SampleError("missing_image", "the record has no bytes of an image")
    return content


def _name(reference: Any) -> str:
    return reference["path"] if isinstance(reference, dict) else reference
