"""Pairs to look at: some that were kept and some that were dropped, with their pictures where the pool is at hand."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from ...files import shard_path
from ...places import Place, open_file, place
from ...processing.images import decode_image
from ...processing.sample_error import SampleError
from ..scoring.score_files import RECORDS_OF, read_score_metadata
from ..storage.tars import IMAGE_EXTENSIONS, Sample, index_shard, read_member
from .decisions import Selection
from .histograms import SAMPLED_ROWS
from .tables import FILE_FACTOR, fetch_row, one_in

EXAMPLES = 20  # of kept and of dropped pairs
THUMBNAIL = 192  # pixels of the longer side


class Content(NamedTuple):
    """What a tar holds of a pair."""

    caption: str = ""  # its text; empty if it cannot be read
    picture: bytes | None = None  # a JPEG of at most `THUMBNAIL` pixels
    problem: str = ""  # why there is no picture; empty if there is one


class Example(NamedTuple):
    """A pair to look at."""

    step: int  # `decided.step`
    uid: str  # 32 hex digits
    key: str | None  # of its sample
    tar: str  # name of its file without the suffix
    reason: str  # why it was kept or dropped
    scores: dict[str, float | None]  # by name
    content: Content  # what can be seen
    twin: Content | None  # of a duplicate, the pair that was kept in place of it


def find_examples(selection: Selection, tars: Sequence[Place] | None) -> list[Example]:
    """Pick pairs to look at, the same ones in every run, and read them from their tars."""
    dropped = max(1, EXAMPLES // (selection.kept + (selection.deduplicate is not None) + selection.draws))
    rows = []
    for step in range(selection.kept + 3):
        rows += _pick(selection, step, EXAMPLES if step == selection.kept else dropped)
    row_ids = {row[column] for row in rows for column in ("row_id", "keeper_row_id")} - {None}
    samples = {row_id: _sample_of(selection, row_id) for row_id in row_ids}
    contents = read_contents(samples.values(), tars)
    return [
        Example(
            row["step"],
            row["uid"],
            samples[row["row_id"]][1],
            samples[row["row_id"]][0].stem,
            row["reason"],
            {name: row[f"s{number}"] for name, number in selection.columns.scores.items()},
            contents[samples[row["row_id"]]],
            None if row["keeper_row_id"] is None else contents[samples[row["keeper_row_id"]]],
        )
        for row in rows
    ]


def _pick(selection: Selection, step: int, count: int) -> list[dict[str, Any]]:
    """Rows of a step, drawn by their uids."""
    connection = selection.connection
    (rows,) = fetch_row(connection, "SELECT count(*) FROM decided WHERE step = $step", {"step": step})
    reason, parameters = selection.reason()
    scores = "".join(f", s{number}" for number in selection.columns.scores.values())
    picked = connection.sql(
        f"""
        SELECT replace(uid::VARCHAR, '-', '') AS uid, step, {reason} AS reason, row_id,
            keeper::VARCHAR AS keeper {scores}
        FROM (
            SELECT * FROM decided WHERE step = $step AND {one_in(rows, SAMPLED_ROWS)}
            ORDER BY md5_number_lower($seed || uid::VARCHAR), uid LIMIT {count}
        ) AS picked ORDER BY picked.uid
        """,
        params={**parameters, "step": step, "seed": f"{selection.seed}:"},
    )
    rows = picked.to_arrow_table().to_pylist()
    # A lookup of its own: as a join this would be one with the whole table.
    keepers = [row["keeper"] for row in rows if row["keeper"]]
    found = connection.execute(
        "SELECT uid::VARCHAR, row_id FROM decided WHERE uid IN (SELECT unnest($keepers::VARCHAR[])::UUID)",
        {"keepers": keepers},
    ).fetchall()
    row_ids = dict(found)
    return [{**row, "keeper_row_id": row_ids.get(row["keeper"])} for row in rows]


def _sample_of(selection: Selection, row_id: int) -> tuple[Path, str | None]:
    """Score file and key of a row of the scores."""
    number, row = divmod(row_id, FILE_FACTOR)
    path = selection.scores.files[number]
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row < rows:
            return path, file.read_row_group(group, columns=["key"])["key"][row].as_py()
        row -= rows
    raise AssertionError(f"{path} has fewer rows than it had")


def read_contents(
    samples: Iterable[tuple[Path, str | None]], tars: Sequence[Place] | None = None
) -> dict[tuple[Path, str | None], Content]:
    """What there is of each sample, by its score file and key; every tar is indexed once."""
    by_name = None if tars is None else {tar.stem: tar for tar in tars}
    keys: dict[Path, set[str | None]] = {}
    for score_file, key in samples:
        keys.setdefault(score_file, set()).add(key)
    contents = {}
    for score_file, wanted in keys.items():
        tar = tar_of(score_file) if by_name is None else by_name.get(score_file.stem)
        found = {} if tar is None else {sample.key: sample for sample in index_shard(tar).samples}
        is_conversation = read_score_metadata(score_file).get("recipe", {}).get(RECORDS_OF)
        missing = "a conversation" if is_conversation else "not in the pool"
        for key in wanted:
            sample = found.get(key)
            contents[score_file, key] = Content(problem=missing) if sample is None else _read(tar, sample)
    return contents


def tar_of(score_file: Path) -> Place | None:
    """The tar that a score file names, if it is still there."""
    source = read_score_metadata(score_file).get("recipe", {}).get("source")
    tar = place(shard_path(score_file.parent, source)) if source else None
    return tar if tar is not None and tar.suffix == ".tar" and tar.is_file() else None


def _read(tar: Place, sample: Sample) -> Content:
    caption = ""
    try:
        extension = next((ext for ext in IMAGE_EXTENSIONS if ext in sample.members), None)
        with open_file(tar) as file:
            if "txt" in sample.members:
                text = read_member(file, f"{sample.key}.txt", *sample.members["txt"])
                caption = text.decode(errors="replace")
            if extension is None:
                return Content(caption, None, "missing_image")
            image = read_member(file, f"{sample.key}.{extension}", *sample.members[extension])
        return Content(caption, _thumbnail(image))
    except SampleError as error:
        return Content(caption, None, error.reason)


def _thumbnail(data: bytes) -> bytes:
    image = decode_image(data, (THUMBNAIL, THUMBNAIL))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
