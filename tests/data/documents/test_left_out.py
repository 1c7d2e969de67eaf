"""No content of a record is left out, or trained although it is set aside, without a reason or a line that says so."""

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.documents.forms import as_messages
from open_qwen2vl.data.documents.sources import source_kind
from open_qwen2vl.data.documents.texts import decode_caption, read_caption, read_interleaved
from open_qwen2vl.data.packing.packed_dataset import PackedDataset
from open_qwen2vl.processing.conversation_records import MAX_TEXT, read_conversation
from open_qwen2vl.processing.sample_error import SampleError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "A"}
SEES = {"role": "user", "content": "<image>q"}
URL = "http://x.com/a.png"


def reason(read, *args):
    with pytest.raises(SampleError) as error:
        read(*args)
    return error.value.reason


@pytest.mark.parametrize(
    ("user", "answer", "expected"),
    [
        ({"value": "other"}, {}, "ambiguous_conversation"),
        ({"from": "gpt"}, {}, "ambiguous_conversation"),
        ({"content": [{"type": "image", "image": "a.png", "text": "seen?"}]}, {}, "unknown_content"),
        ({"content": [{"type": "video", "video": "a.mp4", "start_time": 3}]}, {}, "unknown_content"),
        ({"content": [{"type": "video", "video": "a.mp4", "num_frames": 8}]}, {}, "unknown_content"),
        ({}, {"thought": "hm"}, "unread_text"),
        ({}, {"trainable": False}, "no_trained_turn"),
        ({}, {"train_on_turn": False}, "no_trained_turn"),
        ({"content": "x" * (MAX_TEXT + 1)}, {}, "text_too_large"),
    ],
)
def test_turns_that_say_two_things(user, answer, expected):
    record = {"messages": [{**USER, **user}, {**ANSWER, **answer}]}
    assert reason(read_conversation, record) == expected


def test_the_same_twice_is_no_contradiction():
    record = {"messages": [{**USER, "from": "human", "value": "q"}, {**ANSWER, "from": "gpt"}]}
    assert [message["role"] for message in read_conversation(record).messages] == ["user", "assistant"]


def test_a_system_message_beside_the_turns():
    messages = read_conversation({"messages": [USER, ANSWER], "system_message": "S"}).messages
    assert messages[0] == {"role": "system", "content": [{"type": "text", "text": "S"}]}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [SEES, ANSWER], "images": [{"url": URL}]},
        {"messages": [SEES, ANSWER], "images": [{"type": "image_url", "image_url": {"url": URL}}]},
        {"messages": [SEES, ANSWER], "images": ["s3://bucket/a.png"]},
        {"messages": [SEES, ANSWER], "images": [f" {URL}"]},
        {"messages": [SEES, ANSWER], "image_url": URL},
    ],
)
def test_addresses_of_images_are_called_so(record):
    assert reason(read_conversation, record) == "image_is_url"


def test_addresses_in_captions_and_documents():
    assert reason(read_caption, {"image": {"url": URL}, "caption": "x"}, "caption", True) == "image_is_url"
    assert reason(read_interleaved, {"texts": ["x", None], "images": [None, {"url": URL}]}) == "image_is_url"
    mmc4 = {"text_list": ["a"], "image_info": [{"raw_url": URL, "matched_text_index": 0}]}
    assert reason(read_interleaved, mmc4) == "image_is_url"


def test_captions_of_addresses_are_no_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"url": URL, "caption": "a cat"}))
    with pytest.raises(ValueError, match="a.jsonl.*caption-column"):
        source_kind([tmp_path / "a.jsonl"])
    assert source_kind([tmp_path / "a.jsonl"], "caption").text_format == "text"


def test_turns_of_fine_vision_keep_their_flags():
    rows = {"texts": [{"user": "q", "assistant": "A", "loss": 0}, {"user": "q", "assistant": "B"}]}
    answers = read_conversation(as_messages(rows)).messages[1::2]
    assert [answer.get("train", True) for answer in answers] == [False, True]
    with_system = {"texts": [{"user": "q", "assistant": "A", "system": "S"}]}
    assert reason(as_messages, with_system) == "ambiguous_conversation"


def test_an_empty_struct_is_no_image():
    image = {"bytes": None, "path": None}
    assert reason(read_caption, {"image": image, "caption": "x"}, "caption", True) == "missing_image"
    assert read_caption({"image": image, "caption": "x"}, "caption", False).texts == ["x"]


def test_a_caption_is_of_one_image_or_video():
    both = {"image": "a.jpg", "video": "a.mp4", "caption": "x"}
    assert reason(read_caption, both, "caption", True) == "ambiguous_media"
    for name in ("image", "video"):
        assert len(read_caption({**both, name: None}, "caption", True).images) == 1


@pytest.mark.parametrize(
    "text", ["\ufeff", "\ufeff\ufeff", "\u3164", "\u2800\u2800", "\u115f\u1160\uffa0", "\0\u200b"]
)
def test_captions_without_ink(text):
    assert reason(decode_caption, text.encode()) == "empty_caption"
    assert reason(read_caption, {"caption": text}, "caption", False) == "empty_caption"


def test_a_byte_order_mark_is_no_text():
    assert decode_caption("\ufeff\ufeffa cat".encode()) == "a cat"
    assert read_caption({"caption": "\ufeffa cat"}, "caption", False).texts == ["a cat"]
    assert read_interleaved({"texts": ["\ufeffa", None], "images": [None, "x.png"]}).texts == ["a", None]
    record = {"messages": [{**USER, "content": "\ufeffq"}, {**ANSWER, "content": "\ufeffA"}]}
    texts = [message["content"][0]["text"] for message in read_conversation(record).messages]
    assert texts == ["q", "A"]


def test_long_texts_are_refused_before_they_are_tokenised():
    long = "x" * (MAX_TEXT + 1)
    assert reason(read_interleaved, {"texts": [long], "images": [None]}) == "text_too_large"
    assert reason(read_interleaved, {"text_list": [long[:-2], "yyy"], "image_info": []}) == "text_too_large"
    assert reason(read_caption, {"caption": long}, "caption", False) == "text_too_large"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_fields_that_are_not_read_are_named(tmp_path, processor, caplog, suffix):
    rows = [{"id": "1", "messages": [USER, {**ANSWER, "mood": "good"}], "context": "Read this."}]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    with caplog.at_level(logging.WARNING):
        plan_packs([path], tmp_path / "packs", processor, image_seq_length=4, num_workers=1)
    assert f"{path}: these fields are not read: context, mood of a turn" in caplog.text


def test_fields_of_parts_that_are_not_read_are_named(tmp_path, processor, caplog):
    rows = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "tone": "dry"}]}, ANSWER]}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    plan_packs([tmp_path / "a.json"], tmp_path / "packs", processor, image_seq_length=4, num_workers=1)
    assert "these fields are not read: tone of a part" in caplog.text


def invalid(values: list[bytes]) -> pa.StringArray:
    """Texts that need not be UTF-8."""
    binary = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(binary), binary.buffers()[1], binary.buffers()[2])


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_invalid_utf8_costs_its_row_at_any_depth(tmp_path, processor, suffix):
    contents = invalid([b"q", b"A", b"q", b"\xff", b"q", b"B"])
    turns = pa.StructArray.from_arrays([pa.array(["user", "assistant"] * 3), contents], ["role", "content"])
    table = pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, 2, 4, 6], pa.int32()), turns)})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    report = plan_packs([path], tmp_path / "packs", processor, image_seq_length=4, num_workers=1)
    assert (report.documents, report.skipped) == (2, {"bad_encoding": 1})
    (item,) = PackedDataset(tmp_path / "packs", processor)
    assert not item["dropped"]
    text = processor.tokenizer.decode(item["labels"][item["labels"] >= 0])
    assert text == "A<|im_end|>\nB<|im_end|>\n"


def test_a_table_of_no_rows_is_named(tmp_path, processor):
    pq.write_table(
        pa.table({"messages": pa.array([], pa.list_(pa.struct([("role", pa.string())])))}), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match="a.parquet: not a single record in it"):
        plan_packs([tmp_path / "a.parquet"], tmp_path / "packs", processor, image_seq_length=4, num_workers=1)


def test_absolute_paths_below_the_images_folder(tmp_path, processor):
    for name, colour in (("in/a.png", 10), ("out/a.png", 200)):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8), (colour,) * 3).save(tmp_path / name)
    records = [{"image": str(tmp_path / name), "caption": "a cat"} for name in ("in/a.png", "out/a.png", "in/b.png")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "other").mkdir()
    options = {"image_seq_length": 4, "num_workers": 1, "images": [tmp_path / "other", tmp_path / "in"]}
    report = plan_packs([tmp_path / "a.jsonl"], tmp_path / "packs", processor, **options)
    assert report.skipped == {"missing_image": 1, "unsafe_image_path": 1}
    (item,) = PackedDataset(tmp_path / "packs", processor)
    assert not item["dropped"] and np.all(item["pixel_values"].numpy() == 10)
