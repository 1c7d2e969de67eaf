"""Forms beside captions, documents and conversations: texts alone, rows of CSV and of FineVision; what is unknown."""

import csv
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from open_qwen2vl import PackedDataset, PackingCollator
from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.packing.unpacked_dataset import UnpackedConversations
from open_qwen2vl.processing.conversation_records import read_conversation
from tests.documents import caption_document, conversation_document, interleaved_document

OPTIONS = {"image_seq_length": 4, "max_length": 128, "num_workers": 1}
TEXTS = ["a cat", 'two "dogs",\nrun', "caf\u00e9 <image> <|im_end|>"]


def png(number: int) -> bytes:
    """An image that its number can be told from."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 255 - number, 7)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of three images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


def plan(source, folder, processor, **options):
    return plan_packs([source], folder, processor.tokenizer, **{**OPTIONS, **options})


def documents_of(folder, processor):
    """Ids and labels of all documents, and the items."""
    dataset = PackedDataset(folder, processor)
    items = [dataset[i] for i in range(len(dataset))]
    found = []
    for item in items:
        starts = np.flatnonzero(item["position_ids"].numpy() == 0)[1:]
        parts = [np.split(item[name].numpy(), starts) for name in ("input_ids", "labels")]
        found += [(ids.tolist(), labels.tolist()) for ids, labels in zip(*parts, strict=True)]
    return sorted(found), items


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_csv(path, records):
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def write_parquet(path, records):
    datasets.Dataset.from_list(records).to_parquet(path)
    return path


TEXT_SOURCES = {
    "jsonl": lambda tmp, tar: write_lines(tmp / "a.jsonl", [{"text": text} for text in TEXTS]),
    "csv": lambda tmp, tar: write_csv(tmp / "a.csv", [{"id": n, "text": text} for n, text in enumerate(TEXTS)]),
    "parquet": lambda tmp, tar: write_parquet(tmp / "a.parquet", [{"text": text} for text in TEXTS]),
    "documents": lambda tmp, tar: write_lines(tmp / "a.json", [{"texts": [t], "images": [None]} for t in TEXTS]),
    "tar": lambda tmp, tar: tar(tmp / "a.tar", [(f"{n}.txt", text.encode()) for n, text in enumerate(TEXTS)]),
}


@pytest.mark.parametrize("form", TEXT_SOURCES)
def test_texts_alone_are_documents(make_tar, tmp_path, processor, form):
    source = TEXT_SOURCES[form](tmp_path, make_tar)
    report = plan(source, tmp_path / "packs", processor, **({"text_only": True} if form == "tar" else {}))
    assert (report.documents, report.images, report.patches, report.skipped) == (3, 0, 0, {})
    tokenizer = processor.tokenizer
    bos, eos = tokenizer.convert_tokens_to_ids(["<s>", "<|im_end|>"])
    found, items = documents_of(tmp_path / "packs", processor)
    assert found == sorted(tuple(part.tolist() for part in interleaved_document([t], tokenizer, 4)) for t in TEXTS)
    for ids, labels in found:
        assert (ids[0], ids[-1]) == (bos, eos) and labels == [-100, *ids[1:]]
    assert report.labels == sum(len(ids) - 1 for ids, _ in found)
    batch = PackingCollator()(items)
    assert "pixel_values" not in batch and batch["packing_stats"]["media"] == 0


def test_a_text_without_its_image_is_taken_only_when_asked(make_tar, tmp_path, processor):
    members = [("0.txt", b"a cat"), ("1.txt", b"a dog"), ("1.png", png(1))]
    source = make_tar(tmp_path / "a.tar", members)
    assert plan(source, tmp_path / "packs", processor).skipped == {"missing_image": 1}
    report = plan(source, tmp_path / "asked", processor, text_only=True)
    assert (report.documents, report.images) == (2, 1)
    tokenizer = processor.tokenizer
    wanted = [interleaved_document(["a cat"], tokenizer, 4), caption_document("a dog", tokenizer, 4)]
    found, _ = documents_of(tmp_path / "asked", processor)
    assert found == sorted((ids.tolist(), labels.tolist()) for ids, labels in wanted)


@pytest.mark.parametrize("write", [write_csv, write_lines])
def test_rows_of_path_and_caption(images, tmp_path, processor, write):
    rows = [{"image": f"{n}.png", "caption": text} for n, text in enumerate(TEXTS)]
    rows += [{"image": "9.png", "caption": "gone"}, {"image": "0.png", "caption": ""}]
    source = write(tmp_path / ("a.csv" if write is write_csv else "a.jsonl"), rows)
    report = plan(source, tmp_path / "packs", processor, images=[images], records_per_group=2)
    empty = "missing_caption" if write is write_csv else "empty_caption"
    assert (report.documents, report.skipped) == (3, {"missing_image": 1, empty: 1})
    found, items = documents_of(tmp_path / "packs", processor)
    wanted = [caption_document(text, processor.tokenizer, 4) for text in TEXTS]
    assert found == sorted((ids.tolist(), labels.tolist()) for ids, labels in wanted)
    assert sorted(n for item in items for n in item["pixel_values"][:, 0, 0, 0].tolist()) == [0, 1, 2]
    lost = [row for part in sorted((tmp_path / "packs").glob("skipped-*")) for row in pq.read_table(part).to_pylist()]
    assert {row["reason"]: row["detail"] for row in lost}["missing_image"] == "there is no image 9.png"


@pytest.mark.parametrize(("name", "text"), [("path", "caption"), ("file_name", "text"), ("image_path", "caption")])
@pytest.mark.parametrize(
    ("write", "file"), [(write_csv, "a.csv"), (write_lines, "a.jsonl"), (write_parquet, "a.parquet")]
)
def test_a_path_beside_a_caption_is_an_image(images, tmp_path, processor, write, file, name, text):
    rows = [{name: f"{n}.png", text: caption} for n, caption in enumerate(TEXTS)]
    report = plan(write(tmp_path / file, rows), tmp_path / "packs", processor, images=[images])
    assert (report.documents, report.images, report.skipped) == (3, 3, {})
    _, items = documents_of(tmp_path / "packs", processor)
    assert sorted(n for item in items for n in item["pixel_values"][:, 0, 0, 0].tolist()) == [0, 1, 2]


def test_the_path_of_a_text_is_no_image_and_images_are_asked_for(images, tmp_path, processor):
    rows = [{"path": f"src/{n}.py", "text": text} for n, text in enumerate(TEXTS)]
    report = plan(write_csv(tmp_path / "texts.csv", rows), tmp_path / "packs", processor)
    assert (report.documents, report.images) == (3, 0)
    captions = write_csv(tmp_path / "a.csv", [{"path": "0.png", "caption": "a cat"}])
    with pytest.raises(ValueError, match="names the image 0.png, but no folder or archive of images was given"):
        plan(captions, tmp_path / "none", processor)
    with pytest.raises(ValueError, match="--images is given, but no column names an image among id, caption"):
        plan(
            write_csv(tmp_path / "b.csv", [{"id": 1, "caption": "a cat"}]), tmp_path / "no", processor, images=[images]
        )


def test_the_image_of_a_row_comes_before_its_path(images, tmp_path, processor):
    rows = [{"image": {"bytes": png(n), "path": None}, "path": "gone.png", "caption": "a cat"} for n in range(2)]
    report = plan(write_parquet(tmp_path / "a.parquet", rows), tmp_path / "packs", processor)
    assert (report.documents, report.images, report.skipped) == (2, 2, {})


def test_a_row_that_is_no_row_of_the_csv_is_named(tmp_path, processor):
    (tmp_path / "a.csv").write_bytes(b'text,note\na cat,x\na,dog,x\n\n"a ""mat""",x\n\xff,x\n')
    report = plan(tmp_path / "a.csv", tmp_path / "packs", processor)
    assert (report.documents, report.skipped) == (2, {"invalid_csv": 2})
    found, _ = documents_of(tmp_path / "packs", processor)
    wanted = [interleaved_document([text], processor.tokenizer, 4)[0].tolist() for text in ("a cat", 'a "mat"')]
    assert [ids for ids, _ in found] == sorted(wanted)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_rows_of_finevision_are_conversations(images, tmp_path, processor, form):
    turns = [{"user": "what is it?", "assistant": "a cat", "source": "x"}, {"user": "sure?", "assistant": "yes"}]
    rows = [{"images": [f"{n}.png" for n in range(count)], "texts": turns} for count in (1, 2)]
    if form == "parquet":
        for row in rows:
            row["images"] = [{"bytes": (images / name).read_bytes(), "path": name} for name in row["images"]]
    source = (write_parquet if form == "parquet" else write_lines)(tmp_path / f"a.{form}", rows)
    options = {} if form == "parquet" else {"images": [images]}
    report = plan(source, tmp_path / "packs", processor, **options)
    assert (report.documents, report.images, report.skipped) == (2, 3, {})
    roles = [{"role": role, "content": turn[role]} for turn in turns for role in ("user", "assistant")]
    messages = [read_conversation({"images": row["images"], "messages": roles}).messages for row in rows]
    wanted = [conversation_document(each, processor, 4) for each in messages]
    found, _ = documents_of(tmp_path / "packs", processor)
    assert found == sorted((ids.tolist(), labels.tolist()) for ids, labels in wanted)
    if form == "parquet":
        dataset = UnpackedConversations(datasets.Dataset.from_parquet(str(source)), processor, image_seq_length=4)
        assert sorted(dataset[i]["input_ids"].tolist() for i in range(2)) == [ids for ids, _ in found]


def test_a_tables_own_folder_is_where_its_images_are(images, tmp_path, processor):
    rows = [{"image": f"{n}.png", "text": text} for n, text in enumerate(TEXTS)] + [{"image": "no.png", "text": "x"}]
    source = write_parquet(images / "a.parquet", rows)
    report = plan(source, tmp_path / "packs", processor)
    assert (report.documents, report.skipped) == (3, {"missing_image": 1})
    _, items = documents_of(tmp_path / "packs", processor)
    assert sorted(n for item in items for n in item["pixel_values"][:, 0, 0, 0].tolist()) == [0, 1, 2]
    assert not any(item["dropped"] for item in items)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_an_unknown_form_names_the_forms_that_are_known(tmp_path, processor, form):
    write = {"parquet": write_parquet, "jsonl": write_lines, "csv": write_csv}[form]
    source = write(tmp_path / f"a.{form}", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match=r"prompt, completion.*FineVision.*image and caption of pairs.*or a text"):
        plan(source, tmp_path / "packs", processor)


def test_captions_of_nothing_to_be_seen_are_empty_and_a_mark_in_front_is_no_text(make_tar, tmp_path, processor):
    texts = {"mark": "\ufeffa cat", "only": "\ufeff\u200b\u0301\0 ", "word": "a cat"}
    members = [m for key, text in texts.items() for m in ((f"{key}.png", png(1)), (f"{key}.txt", text.encode()))]
    assert plan(make_tar(tmp_path / "a.tar", members), tmp_path / "packs", processor).skipped == {"empty_caption": 1}
    (first, second), _ = documents_of(tmp_path / "packs", processor)
    assert first == second


def test_a_named_chat_template_is_planned_and_read(tmp_path, processor, backbones):
    other = (
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content[0].text }}{% endgeneration %}{% endfor %}"
    )
    processor = type(processor).from_vision_text_pretrained(**backbones, image_seq_length=4)
    processor.chat_template = (
        {"default": processor.chat_template, "short": other}
        if isinstance(processor.chat_template, str)
        else {**processor.chat_template, "short": other}
    )
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}]
    source = write_lines(tmp_path / "a.jsonl", [{"messages": turns}])
    lengths = []
    for name in (None, "short"):
        folder = tmp_path / f"packs {name}"
        plan_packs([source], folder, processor, **OPTIONS, chat_template=name)
        lengths.append(len(PackedDataset(folder, processor)[0]["input_ids"]))
    assert lengths[1] < lengths[0]
    with pytest.raises(ValueError, match="no chat template named 'none' among default, .*short"):
        plan_packs([source], tmp_path / "none", processor, **OPTIONS, chat_template="none")
    processor.chat_template = processor.chat_template["default"]
    with pytest.raises(ValueError, match="planned with another processor: there is no chat template named 'short'"):
        PackedDataset(tmp_path / "packs short", processor)
