"""Captions in tables: the same documents as from tars, their columns, bad rows, images by path."""

import datasets
import pytest
import torch
from PIL import Image

from open_qwen2vl import PackedDataset
from open_qwen2vl.cli import main
from open_qwen2vl.data import find_sources, plan_packs
from open_qwen2vl.data.storage.tars import index_shard
from tests.documents import plan_rows

OPTIONS = {"image_seq_length": 4, "max_length": 128, "num_workers": 1}


def plan(sources, folder, processor, **options):
    return plan_packs(sources, folder, processor.tokenizer, **{**OPTIONS, **options})


def documents_of(dataset):
    """Ids, labels and pixels of every document."""
    found = []
    for item in (dataset[i] for i in range(len(dataset))):
        starts = torch.nonzero(item["position_ids"] == 0).flatten()[1:]
        parts = [torch.tensor_split(item[name], starts) for name in ("input_ids", "labels")]
        found += [
            (ids.tolist(), labels.tolist(), pixels.flatten().tolist())
            for ids, labels, pixels in zip(*parts, item["pixel_values"], strict=True)
        ]
    return sorted(found)


@pytest.fixture
def pairs(caption_tars):
    """The pairs of the tars: key, caption, the image's bytes."""
    found = []
    for tar in caption_tars:
        data = tar.read_bytes()
        for sample in index_shard(tar).samples:
            png, txt = (data[offset : offset + size] for offset, size in map(sample.members.get, ("png", "txt")))
            found.append((sample.key, txt.decode(), png))
    return found


@pytest.mark.parametrize("form", ["parquet", "saved", "image feature", "by path"])
def test_tables_become_the_same_documents_as_tars(caption_tars, pairs, tmp_path, processor, form):
    (tmp_path / "images").mkdir()
    rows = []
    for number, (_, caption, png) in enumerate(pairs):
        (tmp_path / f"images/{number}.png").write_bytes(png)
        image = f"{number}.png" if form == "by path" else {"bytes": png, "path": None}
        rows.append({"image": image, "caption": caption, "text": "another", "url": "x"})
    data = datasets.Dataset.from_list(rows)
    if form == "image feature":
        data = data.cast_column("image", datasets.Image())
    if form == "saved":
        data.save_to_disk(tmp_path / "table")
    else:
        (tmp_path / "table").mkdir()
        data.to_parquet(tmp_path / "table/a.parquet", batch_size=50)
    options = {"images": [tmp_path / "images"]} if form == "by path" else {}
    report = plan(find_sources([tmp_path / "table"]), tmp_path / "rows", processor, records_per_group=50, **options)
    assert (report.documents, report.images, report.skipped) == (120, 120, {})
    plan(caption_tars, tmp_path / "tars", processor)
    found, expected = (documents_of(PackedDataset(tmp_path / name, processor)) for name in ("rows", "tars"))
    assert found == expected


def test_the_caption_column_is_a_choice(pairs, tmp_path, processor, backbones, capsys):
    rows = [{"image": {"bytes": png}, "alt": caption, "text": "x"} for _, caption, png in pairs[:10]]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    arguments = ["pack", str(tmp_path / "a.parquet"), "--tokenizer", backbones["text"], "--image-seq-length", "4"]
    assert main([*arguments, "--output", str(tmp_path / "alt"), "--caption-column", "alt"]) == 0
    assert main([*arguments, "--output", str(tmp_path / "text")]) == 0
    totals = [PackedDataset(tmp_path / name, processor).plan["totals"]["tokens"] for name in ("alt", "text")]
    assert totals[0] > totals[1]
    assert main([*arguments, "--output", str(tmp_path / "none"), "--caption-column", "none"]) == 2
    assert "no columns image and none (--caption-column) among image, alt, text" in capsys.readouterr().err
    assert main([*arguments, "--output", str(tmp_path / "text"), "--caption-column", "alt"]) == 2
    assert "made with caption_column text, now alt" in capsys.readouterr().err


def test_bad_rows_are_named(encode, tmp_path, processor):
    good = encode(Image.new("RGB", (8, 8), (9, 9, 9)))
    rows = [
        {"image": {"bytes": good, "path": "x"}, "text": "a cat", "id": 7, "uid": "AB" * 16},
        {"image": {"bytes": good, "path": "x"}, "text": " ", "id": 8},
        {"image": {"bytes": good, "path": "x"}, "text": None, "id": 9},
        {"image": None, "text": "a cat"},
        {"image": {"bytes": good, "path": "x"}, "text": "x" * 300, "id": 10},
        {"image": {"bytes": b"no image", "path": "x"}, "text": "a dog", "id": 11},
        {"image": {"bytes": None, "path": "x"}, "text": "a mat", "id": 12},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    report = plan([tmp_path / "a.parquet"], tmp_path / "packs", processor)
    skipped = {"empty_caption": 1, "missing_caption": 1, "missing_image": 2, "too_long": 1}
    assert (report.documents, report.skipped) == (2, skipped)
    named = {(row["key"], row["reason"]) for row in plan_rows(tmp_path / "packs", "skipped")}
    assert named == {("8", "empty_caption"), ("9", "missing_caption"), ("row 3", "missing_image"), ("10", "too_long"),
                     ("12", "missing_image")}  # fmt: skip
    uids = [d["uid"] for p in plan_rows(tmp_path / "packs", "part") for d in p["documents"]]
    assert "ab" * 16 in uids and len(set(uids)) == 2
    item = PackedDataset(tmp_path / "packs", processor)[0]
    assert item["dropped"] == {"corrupt_image": 1} and len(item["pixel_values"]) == 1


def test_what_cannot_be_planned_is_one_clear_error(caption_tars, encode, tmp_path, processor):
    image = {"bytes": encode(Image.new("RGB", (8, 8)))}
    for name, row in {
        "lists": {"image": image, "text": ["a", "b"]},
        "caption": {"image": image, "caption": "a"},
        "text": {"image": image, "text": "a"},
        "other": {"image": image, "alt": "a"},
        "path": {"image": "a.png", "text": "a"},
        "photo": {"photo": "a.png", "caption": "a"},
        "listed": {"videos": ["a.mp4"], "text": "a"},
    }.items():
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / f"{name}.parquet")
    for sources, options, message in (
        (["caption", "text"], {}, "captions are in the columns caption and text of different files: name one"),
        (
            ["other"],
            {},
            r"other.parquet: no column messages or conversations among image, alt, nor .*--caption-column",
        ),
        (["photo"], {}, r"captions without a column image among photo, caption: .*--caption-column caption"),
        (
            ["listed"],
            {},
            r"listed.parquet: texts with videos, of which nobody knows the places: .*--caption-column text",
        ),
        (["lists"], {}, "none of 1 samples can be packed: {'bad_caption': 1}"),
        (["path"], {}, "none of 1 samples can be packed: {'missing_image': 1}"),  # looked up beside the table
        (["text"], {"rules": "original"}, "rules original are for interleaved documents, not for captions"),
        (["text"], {"rules": "none"}, "rules must be standard or original, got 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(
                [tmp_path / f"{name}.parquet" for name in sources],
                tmp_path / f"packs of {sources[0]}",
                processor,
                **options,
            )
    # Asked for by name they are texts.
    assert plan([tmp_path / "photo.parquet"], tmp_path / "t", processor, caption_column="caption").images == 0
    (tmp_path / "a.jsonl").write_text('{"photo": "a.png", "caption": "a"}')
    (tmp_path / "a.csv").write_text("photo,caption\na.png,a cat\n")
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(ValueError, match=f"{name}: captions without a column image among "):
            plan([tmp_path / name], tmp_path / "packs", processor)
    # Any of the first records tells, and an empty list tells nothing.
    lines = ['{"text": "a", "images": []}', '{"text": "b", "images": ["a.png"]}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="a.jsonl: texts with images, of which nobody knows the places"):
        plan([tmp_path / "a.jsonl"], tmp_path / "packs", processor)
    (tmp_path / "a.jsonl").write_text(lines[0])
    assert plan([tmp_path / "a.jsonl"], tmp_path / "of empty lists", processor).documents == 1
    with pytest.raises(ValueError, match="00000.tar: --caption-column alt is for tables, json and csv files"):
        plan(caption_tars, tmp_path / "packs", processor, caption_column="alt")


def test_rows_by_path_stand_beside_rows_with_bytes(pairs, tmp_path, processor):
    """Each image is found where it is, whatever the others of its row group are."""
    (tmp_path / "images").mkdir()
    rows = []
    for number, (_, caption, png) in enumerate(pairs[:40]):
        (tmp_path / f"images/{number}.png").write_bytes(png)
        path = {"bytes": None, "path": f"{number}.png"}
        rows.append({"image": path if number % 3 == 0 else {"bytes": png, "path": None}, "caption": caption})
    plans = []
    for name, own in (("mixed", rows), ("bytes", [{"image": {"bytes": png, "path": None}, "caption": caption}
                                                  for _, caption, png in pairs[:40]])):  # fmt: skip
        (tmp_path / name).mkdir()
        datasets.Dataset.from_list(own).to_parquet(tmp_path / name / "0.parquet")
        report = plan(
            [tmp_path / name / "0.parquet"], tmp_path / f"packs-{name}", processor, images=[tmp_path / "images"]
        )
        assert (report.documents, report.skipped) == (40, {})
        plans.append(documents_of(PackedDataset(tmp_path / f"packs-{name}", processor)))
    assert plans[0] == plans[1]
