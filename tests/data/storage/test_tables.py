"""Tables as `datasets` and others write them: JSON in cells, images by path beside images with bytes, damage."""

import glob
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from open_qwen2vl.data.storage import row_values as rows_module
from open_qwen2vl.data.storage import tables
from open_qwen2vl.data.storage.row_values import row_values
from open_qwen2vl.data.storage.tables import Columns, RowTable, column_names, cut_rows, find_tables
from open_qwen2vl.processing.conversation_records import read_conversation
from open_qwen2vl.processing.sample_error import SampleError

COLUMNS = Columns(("messages", "caption", "id"), ("image", "images"))


def planned(path, columns=COLUMNS):
    """All rows as a planner reads them."""
    table = RowTable(path, columns)
    rows = [row for _, row in table.rows_to_plan(0, int(table.ends[-1]))]
    table.close()
    return rows


def read(path, columns=COLUMNS):
    """All rows one by one as training reads them."""
    table, found = RowTable(path, columns), []
    for number in range(int(table.ends[-1])):
        batch, row = table.find(number)
        try:
            found += row_values(table.read_batch(batch).slice(row, 1))
        except SampleError as error:
            found.append(error)
    assert [str(row) for _, row in table.rows(0, len(found))] == [str(row) for row in found]
    return found


def reasons(rows):
    return [getattr(row, "reason", None) for row in rows]


@pytest.fixture(params=["parquet", "arrow"])
def write(request, tmp_path):
    """`write(table)`: the path of a file of one of the two kinds."""

    def write_table(table, **options):
        path = tmp_path / f"t.{request.param}"
        if request.param == "parquet":
            pq.write_table(table, path, **options)
        else:
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
        return path

    return write_table


MIXED = [
    {"messages": [{"role": "system", "content": "Be short."},
                  {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]},
                  {"role": "assistant", "content": "a cat"}], "image": "a.png"},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": 42}], "image": None},
    {"messages": [{"role": "user", "content": "\"quoted\""}, {"role": "assistant", "content": "[1]"}], "image": []},
    {"messages": [{"role": "user", "content": "<image>z"}, {"role": "assistant", "content": "y"}], "image": ["b.png"]},
]  # fmt: skip


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_json_in_cells_is_decoded_at_any_depth(tmp_path, form):
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, MIXED)))
    data = datasets.load_dataset("json", data_files=str(tmp_path / "m.jsonl"), split="train", cache_dir=tmp_path / "c")
    assert "Json" in str(data.features)
    if form == "saved":
        data.save_to_disk(tmp_path / "saved")
        (path,) = glob.glob(str(tmp_path / "saved/*.arrow"))
    else:
        data.to_parquet(path := tmp_path / "m.parquet")
    for rows in (planned(path), read(path)):
        # A text that is JSON itself comes back parsed from datasets' own reading, too.
        assert rows == data.to_list() and [rows[n] for n in (0, 1, 3)] == [MIXED[n] for n in (0, 1, 3)]
        assert read_conversation(rows[0]).images == ["a.png"] and read_conversation(rows[3]).images == ["b.png"]
        with pytest.raises(SampleError, match="is a int"):
            read_conversation(rows[1])


def test_captions_of_mixed_types(tmp_path):
    rows = [
        {"caption": "a cat", "image": "a.png"},
        {"caption": 5, "image": "b.png"},
        {"caption": None, "image": ["c"]},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = datasets.load_dataset("json", data_files=str(tmp_path / "c.jsonl"), split="train", cache_dir=tmp_path / "c")
    data.to_parquet(tmp_path / "c.parquet")
    for found in (planned(tmp_path / "c.parquet"), read(tmp_path / "c.parquet")):
        assert found == rows


def test_json_that_is_none_costs_its_row(write):
    texts = pa.array(['"a"', '{"b": ', None, "[" * 100_000])
    path = write(pa.table({"caption": pa.ExtensionArray.from_storage(pa.json_(), texts)}))
    for rows in (planned(path), read(path)):
        assert reasons(rows) == [None, "invalid_json", None, "invalid_json"]
        assert rows[0] == {"caption": "a"} and rows[2] == {"caption": None}


IMAGES = [{"bytes": b"x" * 500, "path": None}, {"bytes": None, "path": "a.png"}, None, {"bytes": None, "path": None},
          {"bytes": b"y" * 500, "path": "b.png"}]  # fmt: skip


def without_content(image):
    return image and {**image, "bytes": None if image["bytes"] is None else b""}


@pytest.mark.parametrize("group", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"write_statistics": False}])
def test_images_by_path_beside_images_with_bytes(write, group, options):
    path = write(pa.table({"image": IMAGES}), row_group_size=group, **options)
    assert [row["image"] for row in planned(path)] == list(map(without_content, IMAGES))
    assert [row["image"] for row in read(path)] == IMAGES
    lists = [[IMAGES[0], IMAGES[1]], None, [], [IMAGES[2], IMAGES[4]], [IMAGES[3]]]
    path = write(pa.table({"images": lists}), row_group_size=group, **options)
    expected = [images and list(map(without_content, images)) for images in lists]
    assert [row["images"] for row in planned(path)] == expected


def test_no_content_is_read_where_all_images_have_it(tmp_path, monkeypatch):
    images = [*[IMAGES[0], None] * 5, IMAGES[4]]
    pq.write_table(pa.table({"image": images, "images": [[image] for image in images]}), tmp_path / "t.parquet")
    asked = []
    read_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda *args, **kwargs: (asked.extend(kwargs["columns"]), read_group(*args, **kwargs))[1],
    )
    assert [row["image"] for row in planned(tmp_path / "t.parquet")] == list(map(without_content, images))
    assert sorted(asked) == ["image.path", "images.list.element.path"]


def test_text_that_is_no_utf8_costs_its_row(write):
    broken = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 3, 4], np.int32)), pa.py_buffer(b"a\xff\xfeb")]
    )
    path = write(pa.table({"caption": broken, "id": ["1", "2", "3"]}))
    for rows in (planned(path), read(path)):
        assert reasons(rows) == [None, "bad_encoding", None] and rows[2] == {"caption": "b", "id": "3"}


def test_one_large_value_for_many_rows_is_not_written_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LARGE_BATCH", 10_000)
    monkeypatch.setattr(rows_module, "MAX_TEXT_BYTES", 50_000)
    values = ["a cat", "x" * 60_000]
    captions = pa.array([values[number % 2] for number in range(60)])
    messages = [[{"role": "user", "content": values[number % 2]}] for number in range(60)]
    pq.write_table(pa.table({"caption": captions, "messages": messages}), tmp_path / "t.parquet", compression="zstd")
    assert os.path.getsize(tmp_path / "t.parquet") < 3000
    table = RowTable(tmp_path / "t.parquet", COLUMNS)
    assert table.read_batch(0).nbytes < 4 * 60_000
    for rows in (planned(tmp_path / "t.parquet"), read(tmp_path / "t.parquet")):
        assert reasons(rows) == [None, "record_too_large"] * 30 and rows[2]["caption"] == "a cat"


def test_a_claim_of_any_number_of_values_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_VALUES", 50)
    pq.write_table(pa.table({"caption": pa.nulls(60, pa.string())}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="t.parquet: a row group claims 60 values of caption"):
        RowTable(tmp_path / "t.parquet", COLUMNS)


def test_a_part_without_row_groups_has_no_rows(tmp_path):
    schema = pa.schema([("caption", pa.string()), ("image", pa.string())])
    pq.ParquetWriter(tmp_path / "t.parquet", schema).close()
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 0
    assert cut_rows(tmp_path / "t.parquet", 10, COLUMNS) == [] and column_names(tmp_path / "t.parquet") == schema.names


def test_columns_that_nobody_asks_for_may_hold_anything(write):
    times = pa.array([2**63 - 1, -(2**63)], pa.int64()).cast(pa.timestamp("us"))
    path = write(pa.table({"caption": ["a", "b"], "time": times}))
    assert [row["caption"] for row in planned(path)] == [row["caption"] for row in read(path)] == ["a", "b"]


def captions(number):
    return pa.table({"caption": [f"{n} cats" for n in range(number)], "image": [IMAGES[0]] * number})


def test_damage_costs_rows_and_ends_nothing(write, tmp_path):
    """Bits flipped and ends cut off, at some hundred places: a ValueError when opened, or errors in place of rows."""
    path = write(captions(40), **({"row_group_size": 10, "compression": "snappy"}))
    whole, random = path.read_bytes(), np.random.default_rng(0)
    found = set()
    for _ in range(150):
        data = bytearray(whole)
        for place in random.integers(0, len(data), random.integers(1, 4)):
            data[place] = random.integers(0, 256)
        path.write_bytes(data[: random.integers(1, len(data))] if random.random() < 0.3 else data)
        try:
            column_names(path)
            rows = planned(path) + read(path)
        except ValueError as error:
            assert path.name in str(error)
            continue
        found.update(filter(None, reasons(rows)))
    assert found <= {"corrupt_table", "bad_encoding", "record_too_large", "moved_row"}


def test_a_broken_page_costs_its_row_group(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(captions(30), path, row_group_size=10, compression="zstd", use_dictionary=False)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    for rows in (planned(path), read(path)):
        assert reasons(rows) == [None] * 10 + ["corrupt_table"] * 10 + [None] * 10


def test_an_arrow_file_that_is_cut_while_it_is_open_is_an_error_not_a_crash(tmp_path):
    path = tmp_path / "t.arrow"
    with pa.ipc.new_stream(path, captions(5).schema) as writer:
        writer.write_table(captions(5000), max_chunksize=500)
    table = RowTable(path, COLUMNS)
    os.truncate(path, 1000)
    with pytest.raises(SampleError) as error:
        table.read_batch(9)
    assert error.value.reason == "corrupt_table" and str(path) in str(error.value)
    assert set(reasons(row for _, row in table.rows_to_plan(0, 5000))) == {"corrupt_table"}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"_data_files": [{}]}', '{"_data_files": 5}'])
def test_a_broken_description_of_a_saved_data_set_is_one_line(tmp_path, content):
    for name in ("state.json", "dataset_dict.json"):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name}: not as"):
            find_tables(tmp_path)
