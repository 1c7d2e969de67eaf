"""Finding records in JSON files: arrays, lines, any content, broken ones, memory."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_qwen2vl.data.storage import json_records
from open_qwen2vl.data.storage.json_records import cut_records, read_record, record_spans
from open_qwen2vl.places import open_file
from open_qwen2vl.processing.sample_error import SampleError

TEXTS = st.text(alphabet=st.sampled_from('{}[]"\\\n\u2028 a,:\u00e9\U0001f600'), max_size=12)
VALUES = st.recursive(TEXTS | st.none() | st.integers(), lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v))
RECORDS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), max_size=12)


def read_all(path, number=5):
    with open_file(path) as file:
        return [
            [record for span in record_spans(path, *group) if (record := read_record(file, *span)) is not None]
            for group in cut_records(path, number)
        ]


@settings(max_examples=50, deadline=None)
@given(records=RECORDS, number=st.integers(1, 5), block=st.integers(1, 40), ascii_only=st.booleans(),
       indent=st.sampled_from([None, 0, 2, "lines"]))  # fmt: skip
def test_every_record_is_found_whatever_the_blocks(records, number, block, ascii_only, indent):
    if indent == "lines":
        text = "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records)
    else:
        text = json.dumps(records, ensure_ascii=ascii_only, indent=indent)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_BLOCK", block)
        path = Path(folder, "a.json")
        path.write_bytes(text.encode())
        groups = read_all(path, number)
    assert [record for group in groups for record in group] == records
    assert all(len(group) == number for group in groups[:-1])


def test_a_byte_order_mark_a_missing_last_newline_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n\n  \n{"id": 2}')
    assert sum(read_all(path), []) == [{"id": 1}, {"id": 2}]
    path.write_bytes(b'\xef\xbb\xbf [{"id": 1}]\n')
    assert read_all(path) == [[{"id": 1}]]
    path.write_bytes(b"")
    assert read_all(path) == []


def test_a_broken_record_costs_itself_only(tmp_path):
    good = json.dumps({"id": "a"})
    for name, joined in (("a.json", f'[{good}, {{"id": nope}}, {good}]'), ("a.jsonl", f'{good}\n{{"id": "\n{good}\n')):
        path = tmp_path / name
        path.write_text(joined)
        spans = list(record_spans(path, *cut_records(path, 10)[0]))
        assert len(spans) == 3
        with open_file(path) as file:
            assert [read_record(file, *spans[i]) for i in (0, 2)] == [{"id": "a"}] * 2
            with pytest.raises(SampleError, match=f"at byte {spans[1][0]}") as caught:
                read_record(file, *spans[1])
        assert caught.value.reason == "invalid_json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1}, {"id": 2', r"does not end with \] at byte 20: the file was cut off"),
        ('[{"id": 1}, {"id: 2}, {"id": 3}]', "the record at byte 12 does not end: invalid JSON there"),
        ('[{"id": 1}, {"id": {2}, {"id": 3}]', "the record at byte 12 does not end"),
        ('[{"id": 1}}, {"id": 3}]', "a closing brace without an opening one between byte 0 and 23"),
    ],
)
def test_an_array_that_cannot_be_cut_is_an_error_with_the_byte(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"a.json: .*{message}"):
        cut_records(path, 10)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_huge_record_is_passed_over_unread(tmp_path, name):
    import tracemalloc

    path, array = tmp_path / name, name == "a.json"
    with open(path, "wb") as file:
        file.write(b"[" * array + b'{"id": 1}' + (b", " if array else b"\n") + b'{"id": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}' + (b", " if array else b"\n") + b'{"id": 3}' + b"]" * array)
    tracemalloc.start()
    spans = list(record_spans(path, *cut_records(path, 10)[0]))
    with open_file(path) as file:
        assert [read_record(file, *spans[i]) for i in (0, 2)] == [{"id": 1}, {"id": 3}]
        with pytest.raises(SampleError) as caught:
            read_record(file, *spans[1])
    assert caught.value.reason == "record_too_large"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20
    os.unlink(path)
