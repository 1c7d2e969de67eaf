"""The scorer `metadata`: scores that others have computed, from columns of DataComp's parquet files."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...files import describe_shard
from ...places import arrow_source
from ..engine.engine import Outcome, ShardTask
from .score_files import score_table, write_scores
from .scoring import value_names

_ROWS = 1 << 16
_MODEL = "metadata"
_UID_PATTERN = "^[0-9a-fA-F]{32}$"


class TableScorer:
    """Takes values from one parquet file after the other, for one worker of the engine."""

    def __init__(self, columns: Sequence[str], name: str, recipe: dict[str, Any]):
        self._columns = list(columns)
        self._labels = value_names(name, columns)
        self._recipe = recipe

    def __call__(self, task: ShardTask) -> Outcome:
        """Take the values of a file.

        Rows without a uid are left out and counted as `bad_uid`; a null counts as `no_value`, NaN as `nan_score`.
        """
        recipe = {**self._recipe, "source": describe_shard(task.source, task.output.parent)}
        metadata = {"recipe": recipe, "made_with": {}, "samples": 0, "skipped": Counter()}
        try:
            with pq.ParquetFile(arrow_source(task.source)) as file:
                self._check_columns(task, file.schema_arrow)
                batches = file.iter_batches(_ROWS, columns=["uid", *self._columns])
                write_scores(task.output, (self._table(batch, metadata) for batch in batches), metadata)
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{task.source}: not a whole parquet file: {error}") from error
        return Outcome(metadata["samples"], dict(metadata["skipped"]), [])

    def _check_columns(self, task: ShardTask, schema: pa.Schema) -> None:
        for column in ("uid", *self._columns):
            if schema.names.count(column) != 1:
                option = "--scorer metadata" if column == "uid" else f"--columns {column}"
                raise ValueError(f"{task.source}: no column {column} for {option}; it has {', '.join(schema.names)}")
        for column in self._columns:
            kind = schema.field(column).type
            if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
                raise ValueError(f"{task.source}: --columns {column} holds {kind}, not numbers")
        if schema.field("uid").type not in (pa.string(), pa.large_string(), pa.string_view()):
            raise ValueError(f"{task.source}: column uid holds {schema.field('uid').type}, not text")

    def _table(self, batch: pa.RecordBatch, metadata: dict[str, Any]) -> pa.Table:
        """Rows of a batch; its counts are added to the metadata."""
        named = pc.fill_null(pc.match_substring_regex(batch["uid"], _UID_PATTERN), False)
        metadata["samples"] += len(batch)
        metadata["skipped"]["bad_uid"] += len(batch) - named.true_count
        rows = pa.Table.from_batches([batch]).filter(named)
        uids = pc.utf8_lower(rows["uid"]).to_pylist()
        pieces = []
        for label, column in zip(self._labels, self._columns, strict=True):
            values = rows[column].cast(pa.float64())
            reasons = ["no_value" if absent else None for absent in values.is_null().to_pylist()]
            numbers = values.to_numpy().reshape(-1, 1)
            pieces.append(score_table([label], _MODEL, [None] * len(uids), uids, numbers, reasons, "nan_score"))
            metadata["skipped"].update(reason for reason in pieces[-1]["reason"].to_pylist() if reason)
        metadata["skipped"] += Counter()  # drops what counts zero
        return pa.concat_tables(pieces).unify_dictionaries()
