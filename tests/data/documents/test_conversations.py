"""Conversations from plan to tensors: every kind of file and of image place, bad records, resuming, refusals."""

import copy
import io
import json
import logging
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from open_qwen2vl import PackedDataset
from open_qwen2vl.cli import main
from open_qwen2vl.data import find_sources, plan_packs
from open_qwen2vl.data.storage import json_records
from open_qwen2vl.processing.conversation_records import read_conversation
from tests.documents import conversation_document, plan_rows

OPTIONS = {"image_seq_length": 4, "max_length": 256, "num_workers": 1}


def png(number: int) -> bytes:
    """An image that its number can be told from."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 255 - number, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def record(number: int, images: int = 1, text: str = "a cat", **changes) -> dict:
    """A LLaVA record whose images are `sub/<number>-<i>.png`."""
    names = [f"sub/{number}-{i}.png" for i in range(images)]
    turns = [("human", "<image>\n" * images + "what is shown?"), ("gpt", text), ("human", "sure?"), ("gpt", "yes")]
    turns = [{"from": speaker, "value": value} for speaker, value in turns]
    image = {} if not images else {"image": names[0] if images == 1 else names}
    return {"id": f"r{number}", **image, "conversations": turns, **changes}


RECORDS = [record(i, images=i % 3, text="cat " * (i % 7 + 1)) for i in range(30)]
NAMES = [f"sub/{i}-{k}.png" for i in range(30) for k in range(i % 3)]


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with the images of `RECORDS`."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(png(number))
    return folder


@pytest.fixture
def write_json(tmp_path):
    """`write_json(records, name)`: an array, or lines for a name that ends in jsonl."""

    def write(records, name="a.json"):
        lines = name.endswith("jsonl")
        text = "".join(json.dumps(r) + "\n" for r in records) if lines else json.dumps(records)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def as_tar(folder, path, prefix=""):
    with tarfile.open(path, "w") as tar:
        for name in NAMES:
            tar.add(folder / name, prefix + name)
    return path


def as_zip(folder, path, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in NAMES:
            archive.write(folder / name, name)
    return path


def documents_of(dataset):
    """Ids, labels and the numbers of the images of every document."""
    found = []
    for item in (dataset[i] for i in range(len(dataset))):
        starts = torch.nonzero(item["position_ids"] == 0).flatten().tolist() + [len(item["position_ids"])]
        numbers = iter(item["pixel_values"][:, 0, 0, 0].tolist())
        for a, b in zip(starts, starts[1:], strict=False):
            ids, labels = item["input_ids"][a:b].tolist(), item["labels"][a:b].tolist()
            count = ids.count(dataset.processor.image_token_id) // 4
            found.append((ids, labels, [next(numbers) for _ in range(count)]))
        assert next(numbers, None) is None and item["dropped"] == {}
    return sorted(found)


def expected_documents(records, processor):
    found = []
    for r in records:
        conversation = read_conversation(r)
        ids, labels = conversation_document(conversation.messages, processor, 4)
        found.append((ids.tolist(), labels.tolist(), [NAMES.index(name) for name in conversation.images]))
    return sorted(found)


def plan(sources, folder, processor, **options):
    return plan_packs(sources, folder, processor.tokenizer, **{**OPTIONS, **options})


PLACES = {
    "folder": lambda folder, tmp: [folder],
    "tar": lambda folder, tmp: [as_tar(folder, tmp / "a.tar")],
    "tar of .": lambda folder, tmp: [as_tar(folder, tmp / "a.tar", "./")],
    "zip": lambda folder, tmp: [as_zip(folder, tmp / "a.zip")],
    "stored zip": lambda folder, tmp: [as_zip(folder, tmp / "a.zip", zipfile.ZIP_STORED)],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_and_places_of_images(images, write_json, tmp_path, processor, place, name):
    options = {"images": PLACES[place](images, tmp_path), "records_per_group": 12}
    report = plan([write_json(RECORDS, name)], tmp_path / "packs", processor, **options)
    assert (report.samples, report.documents, report.images) == (30, 30, 30)
    dataset = PackedDataset(tmp_path / "packs", processor)
    assert dataset.plan["totals"]["parts"] == 3 and not list((tmp_path / "packs").glob("image-index*"))
    assert documents_of(dataset) == expected_documents(RECORDS, processor)
    assert dataset.per_pack("images").sum() == dataset.per_pack("patches").sum() == 30


def test_several_places_and_the_first_member_of_a_name(images, write_json, tmp_path, processor):
    tar = as_tar(images, tmp_path / "a.tar")
    for number in range(20):
        (images / NAMES[number]).write_bytes(png(99))
    places = [tar, as_zip(images, tmp_path / "b.zip")]
    for name in NAMES[:20]:
        (images / name).unlink()
    plan([write_json(RECORDS)], tmp_path / "packs", processor, images=[images, *places])
    assert documents_of(PackedDataset(tmp_path / "packs", processor)) == expected_documents(RECORDS, processor)


def test_a_tar_that_was_cut_off_keeps_what_is_whole(images, write_json, tmp_path, processor, caplog):
    path = as_tar(images, tmp_path / "a.tar")
    os.truncate(path, path.stat().st_size // 2)
    report = plan([write_json(RECORDS)], tmp_path / "packs", processor, images=[path])
    assert 10 < report.documents < 30 and report.skipped == {"missing_image": 30 - report.documents}
    assert "a.tar: truncated_tar after" in caplog.text
    good = [r for r in RECORDS if r["id"] not in {row["key"] for row in plan_rows(tmp_path / "packs", "skipped")}]
    assert documents_of(PackedDataset(tmp_path / "packs", processor)) == expected_documents(good, processor)


def as_messages(r, image):
    """The record in TRL's form, its images by `image(name)`."""
    conversation = read_conversation(r)
    messages = [
        {**message, "content": [{"type": part["type"], "text": part.get("text")} for part in message["content"]]}
        for message in conversation.messages
    ]
    return {"id": r["id"], "messages": messages, "images": [image(name) for name in conversation.images]}


TABLES = {
    "parquet": lambda data, tmp: data.to_parquet(tmp / "a.parquet", batch_size=7) and tmp / "a.parquet",
    "saved": lambda data, tmp: data.save_to_disk(tmp / "saved") or tmp / "saved",
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("by_path", [False, True])
def test_data_sets_of_hugging_face(images, tmp_path, processor, table, by_path):
    def image(name):
        return {"bytes": None if by_path else (images / name).read_bytes(), "path": name}

    data = datasets.Dataset.from_list([as_messages(r, image) for r in RECORDS])
    assert data.features["images"].feature == {"bytes": datasets.Value("null" if by_path else "binary"),
                                               "path": datasets.Value("string")}  # fmt: skip
    sources = find_sources([TABLES[table](data, tmp_path)])
    options = {"images": [images], "records_per_group": 10} if by_path else {"records_per_group": 10}
    report = plan(sources, tmp_path / "packs", processor, **options)
    assert (report.documents, report.images) == (30, 30)
    dataset = PackedDataset(tmp_path / "packs", processor)
    assert documents_of(dataset) == expected_documents(RECORDS, processor)
    assert documents_of(pickle.loads(pickle.dumps(dataset))) == expected_documents(RECORDS, processor)


def test_rows_with_image_features_and_llava_columns(images, tmp_path, processor):
    own = [{**r, "image": {"bytes": (images / r["image"]).read_bytes(), "path": "x"} if "image" in r else None}
           for r in RECORDS if isinstance(r.get("image", ""), str)]  # fmt: skip
    data = datasets.Dataset.from_list(own).cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / "a.parquet")
    plan([tmp_path / "a.parquet"], tmp_path / "packs", processor)
    expected = expected_documents([r for r in RECORDS if isinstance(r.get("image", ""), str)], processor)
    assert documents_of(PackedDataset(tmp_path / "packs", processor)) == expected


def test_rows_and_records_without_the_bytes_they_promise_are_dropped(images, tmp_path, processor):
    content = [(images / NAMES[0]).read_bytes(), None]
    data = [{"messages": as_messages(r, str)["messages"], "images": [{"bytes": content[i % 2], "path": "x"}]}
            for i, r in enumerate(RECORDS[1::3])]  # fmt: skip
    datasets.Dataset.from_list(data).to_parquet(tmp_path / "a.parquet")
    report = plan([tmp_path / "a.parquet"], tmp_path / "packs", processor, max_length=4096)
    assert report.skipped == {"missing_image": 5}  # of those that have a path only there is no file
    item = PackedDataset(tmp_path / "packs", processor)[0]
    assert item["dropped"] == {} and len(item["pixel_values"]) == 5
    assert (item["input_ids"] == processor.image_token_id).sum() == 20


def test_workers_and_reruns_make_the_same_plan(images, write_json, tmp_path, processor):
    def read_bytes(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    source, tar = write_json(RECORDS), as_tar(images, tmp_path / "a.tar")
    options = {"images": [tar], "records_per_group": 8}
    plan([source], tmp_path / "packs1", processor, **options)
    plan([source], tmp_path / "packs2", processor, **options, num_workers=2)
    whole = read_bytes(tmp_path / "packs1")
    assert read_bytes(tmp_path / "packs2") == whole and len(whole) == 4 * 2 + 4
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "packs1").iterdir()}
    (tmp_path / "packs1/part-00002.arrow").unlink()
    (tmp_path / "packs1/image-index.raw").write_bytes(b"left by a killed run")
    plan([source], tmp_path / "packs1", processor, **options)
    assert read_bytes(tmp_path / "packs1") == whole
    assert (tmp_path / "packs1/part-00000.arrow").stat().st_mtime_ns == times["part-00000.arrow"]
    with pytest.raises(ValueError, match="made with range .*, now"):
        plan([source], tmp_path / "packs1", processor, **{**options, "records_per_group": 9})
    with pytest.raises(ValueError, match="made with other or changed image folders or archives"):
        plan([source], tmp_path / "packs1", processor, **{**options, "images": [images]})


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_mixed_types_in_tables_become_the_documents_of_their_jsonl(images, write_json, tmp_path, processor, form):
    """`datasets` stores fields whose values differ in type as JSON."""
    parts = [{"type": "image"}, {"type": "text", "text": "what is shown?"}]
    records = [
        {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": parts},
                      {"role": "assistant", "content": "a cat"}], "image": NAMES[0]},
        {"messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": [parts[1]]}],
         "image": None},
        {"messages": [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": 42}], "image": None},
        {"messages": [{"role": "user", "content": [parts[0], *parts]}, {"role": "assistant", "content": "no"}],
         "image": NAMES[1:3]},
    ]  # fmt: skip
    source = write_json(records, "a.jsonl")
    data = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(tmp_path / "cache"))
    assert "Json" in str(data.features)
    if form == "saved":
        data.save_to_disk(tmp_path / "saved")
        (table,) = (tmp_path / "saved").glob("*.arrow")
    else:
        data.to_parquet(table := tmp_path / "a.parquet")
    read = []
    for number, path in enumerate((source, table)):
        report = plan([path], tmp_path / f"packs{number}", processor, images=[images], max_length=512)
        assert (report.documents, report.skipped) == (3, {"bad_turn": 1})
        read.append(PackedDataset(tmp_path / f"packs{number}", processor)[0])
    for name in ("input_ids", "labels", "pixel_values"):
        assert torch.equal(read[0][name], read[1][name])


def test_every_bad_record_is_named(images, write_json, tmp_path, processor, monkeypatch, caplog):
    monkeypatch.setattr(json_records, "MAX_RECORD_BYTES", 4000)
    (images / "sub/empty.png").touch()
    (images / "sub/folder.png").mkdir()
    (images / "sub/inside.png").symlink_to(images / NAMES[0])
    (tmp_path / "secret.png").write_bytes(png(1))
    (images / "sub/outside.png").symlink_to(tmp_path / "secret.png")
    (images / "out").symlink_to(tmp_path)
    bad = {
        "missing_image": [record(1, id="m1", image="sub/none.png"), record(1, id="m2", image="sub/folder.png")],
        "empty_image": [record(1, id="e1", image="sub/empty.png")],
        "unsafe_image_path": [
            record(1, id=f"u{i}", image=name)
            for i, name in enumerate(
                ["../secret.png", str(tmp_path / "secret.png"), "sub/../../secret.png", "sub/outside.png",
                 "out/secret.png", "sub/\0.png", "sub/\ud800.png"]
            )
        ],
        "too_many_placeholders": [record(1, id="p1", image=[])],
        "too_few_placeholders": [record(1, id="p2", image=[NAMES[0]] * 2)],
        "too_long": [record(1, id="l1", text="x" * 900)],
        "record_too_large": [record(0, text="x" * 5000)],
        "empty_answer": [record(1, id="a1", text=" ")],
        "no_conversation": [{"id": "c1"}, {"caption": "a cat"}],
        "roles_out_of_order": [{"id": 7, "conversations": record(0)["conversations"][1:]}],
        "bad_encoding": [record(0, id="\udcff", text="half a pair \ud83d")],
    }  # fmt: skip
    good = [record(1, image="sub/inside.png"), *RECORDS[:3]]
    lines = [json.dumps(r) for group in ([good[0]], *bad.values(), good[1:]) for r in group]
    lines[5:5] = ['{"id": "broken", ', "[1, 2]", "", "not json"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING):
        report = plan([tmp_path / "a.jsonl"], tmp_path / "packs", processor, images=[images])
    expected = {reason: len(records) for reason, records in bad.items()}
    assert report.skipped == {**expected, "invalid_json": 2, "not_an_object": 1}
    assert report.documents == len(good) and report.samples == report.documents + sum(report.skipped.values())
    skipped = {(row["key"], row["reason"]) for row in plan_rows(tmp_path / "packs", "skipped")}
    named = {(str(r["id"]), reason) for reason, group in bad.items() for r in group if "id" in r and reason not in
             ("record_too_large", "bad_encoding")}  # fmt: skip
    assert named < skipped and ("\\udcff", "bad_encoding") in skipped
    offsets = [key for key, reason in skipped if reason in ("invalid_json", "not_an_object", "record_too_large")]
    assert all(key.startswith("byte ") for key in offsets) and len(offsets) == 4
    assert "../a.jsonl/m1: missing_image" in caplog.text
    assert {row["file"] for row in plan_rows(tmp_path / "packs", "skipped")} == {"../a.jsonl"}


def test_a_broken_record_in_an_array_costs_itself_only(write_json, tmp_path, processor):
    source = write_json([record(0, 0), "HERE", record(3, 0)])
    source.write_text(source.read_text().replace('"HERE"', '{"id": 1, "conversations": [oops]}'))
    report = plan([source], tmp_path / "packs", processor)
    assert (report.documents, report.skipped) == (2, {"invalid_json": 1})
    source.write_text(source.read_text()[:-40])
    with pytest.raises(ValueError, match="a.json: the array does not end with ] at byte .*: the file was cut off"):
        plan([source], tmp_path / "other", processor)


def test_images_that_break_later_drop_their_whole_conversation(images, write_json, tmp_path, processor, caplog):
    plan([write_json(RECORDS)], tmp_path / "packs", processor, images=[images], max_length=8192)
    (images / NAMES[0]).write_bytes(b"no image")
    (images / NAMES[1]).unlink()
    (images / NAMES[4]).unlink()
    (images / NAMES[4]).symlink_to("/etc/hostname")
    item = PackedDataset(tmp_path / "packs", processor)[0]
    assert item["dropped"] == {"corrupt_image": 1, "missing_image": 1, "unsafe_image_path": 1}
    assert len(item["pixel_values"]) == 30 - 1 - 2 - 2
    assert (item["input_ids"] == processor.image_token_id).sum() == 4 * len(item["pixel_values"])
    assert "../a.json/r1: corrupt_image" in caplog.text


@pytest.mark.parametrize("archive", ["a.tar", "a.zip"])
def test_archives_that_change_behind_the_plan(images, write_json, tmp_path, processor, archive):
    path = (as_tar if archive == "a.tar" else as_zip)(images, tmp_path / archive)
    plan([write_json(RECORDS)], tmp_path / "packs", processor, images=[path], max_length=8192)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    data = path.read_bytes()
    path.write_bytes(data.replace(b"sub/1-0.png", b"sub/X-0.png"))
    os.utime(path, ns=times)
    item = PackedDataset(tmp_path / "packs", processor)[0]
    assert item["dropped"] == {"moved_member": 1} and len(item["pixel_values"]) == 29
    os.utime(path)
    with pytest.raises(ValueError, match=f"the file .*{archive} has changed since it was planned \\(mtime_ns"):
        PackedDataset(tmp_path / "packs", processor)
    path.unlink()
    with pytest.raises(ValueError, match=f"{archive} of this plan is gone"):
        PackedDataset(tmp_path / "packs", processor)


def test_text_that_changes_behind_the_plan_is_dropped(write_json, tmp_path, processor):
    source = write_json([record(i, 0) for i in range(4)])
    plan([source], tmp_path / "packs", processor, max_length=4096)
    times = source.stat().st_atime_ns, source.stat().st_mtime_ns
    text = source.read_text().replace("a cat", "zqzqz", 1)
    source.write_text(text[:-20] + "}" * 20)
    os.utime(source, ns=times)
    assert PackedDataset(tmp_path / "packs", processor)[0]["dropped"] == {"changed_conversation": 1, "invalid_json": 1}


def test_another_chat_template_is_refused(write_json, tmp_path, processor):
    plan([write_json([record(0, 0)])], tmp_path / "packs", processor)
    other = copy.copy(processor)
    other.chat_template = processor.chat_template.replace("helpful", "terse")
    with pytest.raises(ValueError, match="planned with another chat template"):
        PackedDataset(tmp_path / "packs", other)


def test_a_saved_processor_and_its_language_model_give_one_plan(write_json, tmp_path, processor, backbones):
    processor.save_pretrained(tmp_path / "model")
    source = write_json([record(0, 0)])
    for tokenizer, packs in ((str(tmp_path / "model"), "packs1"), (backbones["text"], "packs2")):
        options = ["--tokenizer", tokenizer, "--output", str(tmp_path / packs), "--image-seq-length", "4"]
        assert main(["pack", str(source), *options]) == 0
    assert (tmp_path / "packs1/plan.json").read_bytes() == (tmp_path / "packs2/plan.json").read_bytes()
    assert len(PackedDataset(tmp_path / "packs1", type(processor).from_pretrained(tmp_path / "model"))) == 1


def test_the_command(images, write_json, tmp_path, backbones, capsys):
    arguments = ["pack", str(write_json(RECORDS)), "--output", str(tmp_path / "packs"), "--tokenizer",
                 backbones["text"], "--image-seq-length", "4", "--max-length", "256"]  # fmt: skip
    assert main([*arguments, "--images", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: images are read from folders, .tar and .zip files" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "a record names the image sub/1-0.png, but no folder or archive of images was given" in (
        capsys.readouterr().err
    )
    assert main([*arguments, "--images", str(images)]) == 0
    assert "samples    30\n" in capsys.readouterr().out


def test_what_cannot_be_planned_is_one_clear_error(images, write_json, caption_tars, tmp_path, processor):
    source = write_json([record(0, 0)])
    (tmp_path / "a.tsv").touch()
    for shards, options, message in (
        ([source, caption_tars[0]], {}, "00000.tar and .*a.json are of different kinds"),
        ([tmp_path / "a.tsv"], {}, "a.tsv: packs are planned from files that end in .tar, .json, "),
        (caption_tars, {"images": [images]}, "images are for conversations"),
        ([source], {"images": [tmp_path / "a.tar.gz"]}, "unpack compressed tars"),
        ([source], {"records_per_group": 0}, "records_per_group must be at least 1, got 0"),
        ([write_json([], "b.json")], {}, "b.json: not a single record in it"),
        (
            [write_json([{"id": 1}], "c.json")],
            {},
            "c.json: records of id have no form that is known: messages or conv",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            plan(shards, tmp_path / "packs", processor, **options)
    datasets.Dataset.from_list([{"prompt": "a cat"}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column messages or conversations among prompt, nor .*FineVision"):
        plan([tmp_path / "a.parquet"], tmp_path / "packs", processor)
    (tmp_path / "b.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="b.parquet: not a table that can be read"):
        plan([tmp_path / "b.parquet"], tmp_path / "packs", processor)
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"a": 1}])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="holds the splits train: name one"):
        find_sources([tmp_path / "splits"])
    for split in ("test", "train"):
        shutil.copy(tmp_path / "a.parquet", images / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="holds the splits test, train: name the files, as .*/train-"):
        find_sources([images])
    (images / "test-00000-of-00001.parquet").unlink()
    assert find_sources([images]) == [images / "train-00000-of-00001.parquet"]
    (images / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="images: no .tar file in this folder"):
        find_sources([images])


def test_a_zip_that_cannot_be_read_at_any_place_is_refused(images, write_json, tmp_path, processor):
    path = as_zip(images, tmp_path / "a.zip", zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match="a.zip: sub/1-0.png is encrypted or compressed in another way than deflate"):
        plan([write_json(RECORDS)], tmp_path / "packs", processor, images=[path])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="a.zip: not a zip, or a damaged one"):
        plan([write_json(RECORDS)], tmp_path / "packs", processor, images=[path])


def test_conversations_on_one_image_stay_several(images, write_json, tmp_path, processor):
    records = [record(1, text=f"answer {i}") for i in range(5)]
    report = plan([write_json(records)], tmp_path / "packs", processor, images=[images])
    assert report.documents == 5
    uids = {document["uid"] for pack in plan_rows(tmp_path / "packs", "part") for document in pack["documents"]}
    assert len(uids) == 5
    assert len(documents_of(PackedDataset(tmp_path / "packs", processor))) == 5


def test_packs_hold_no_more_than_their_capacity(images, write_json, tmp_path, processor):
    plan([write_json(RECORDS)], tmp_path / "packs", processor, images=[images], records_per_group=11)
    for pack in plan_rows(tmp_path / "packs", "part"):
        assert pack["tokens"] == sum(document["tokens"] for document in pack["documents"]) <= 256
        assert pack["images"] == sum(len(document["images"]) for document in pack["documents"])
    numbers = np.concatenate(
        [[d["shard"] for d in pack["documents"]] for pack in plan_rows(tmp_path / "packs", "part")]
    )
    assert set(numbers.tolist()) == {0}
