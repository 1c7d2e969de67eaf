import copy
import json
import logging
import os
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from open_qwen2vl import PackedDataset, PackingCollator
from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.packing.plan_files import FIGURES, FIGURES_NAME
from open_qwen2vl.data.storage import open_files as reading
from open_qwen2vl.data.storage.tars import index_shard
from tests.documents import caption_document, plan_rows


@pytest.fixture
def packs(tmp_path, tokenizer):
    """`packs(shards)`: the folder of a plan with 4 tokens an image and packs of 128."""

    def plan(shards, **options):
        folder = tmp_path / "packs"
        plan_packs(
            shards, folder, tokenizer, **{"image_seq_length": 4, "max_length": 128, "num_workers": 1, **options}
        )
        return folder

    return plan


def documents_of(item):
    """Ids, labels and positions of each document of an item, split where positions restart."""
    starts = torch.nonzero(item["position_ids"] == 0).flatten().tolist() + [len(item["position_ids"])]
    names = ("input_ids", "labels", "position_ids")
    return [tuple(item[name][a:b] for name in names) for a, b in zip(starts, starts[1:], strict=False)]


def place(tar, key, ext):
    return next(sample.members[ext] for sample in index_shard(tar).samples if sample.key == key)


def overwrite(tar, offset, data):
    """Change bytes of a tar behind the plan's back: size and modification time stay."""
    times = tar.stat().st_atime_ns, tar.stat().st_mtime_ns
    with open(tar, "r+b") as file:
        file.seek(offset)
        file.write(data)
    os.utime(tar, ns=times)


def test_items_hold_every_document_as_the_processor_lays_it_out(caption_tars, packs, processor):
    dataset = PackedDataset(packs(caption_tars, shards_per_group=2), processor)
    found = []
    for item in (dataset[i] for i in range(len(dataset))):
        assert item["image_seq_length"] == 4 and item["dropped"] == {}
        assert {item[name].dtype for name in ("input_ids", "position_ids", "labels")} == {torch.int64}
        assert item["input_ids"].shape == item["labels"].shape == item["position_ids"].shape
        documents = documents_of(item)
        assert len(item["input_ids"]) <= 128
        assert item["pixel_values"].dtype == torch.uint8 and item["pixel_values"].shape == (len(documents), 3, 32, 32)
        for (ids, labels, positions), pixels in zip(documents, item["pixel_values"], strict=True):
            assert positions.tolist() == list(range(len(ids)))
            found.append((ids.tolist(), labels.tolist(), pixels[:, 0, 0].tolist()))
    expected = []
    for tar in caption_tars:
        data = tar.read_bytes()
        for sample in index_shard(tar).samples:
            offset, size = sample.members["txt"]
            ids, labels = caption_document(data[offset : offset + size].decode(), processor.tokenizer, 4)
            expected.append((ids.tolist(), labels.tolist(), [ord(c) for c in sample.key[-3:]]))
    assert sorted(found) == sorted(expected)


def test_indices(caption_tars, packs, processor):
    dataset = PackedDataset(packs(caption_tars, shards_per_group=1), processor)
    assert dataset[-1]["input_ids"].equal(dataset[len(dataset) - 1]["input_ids"])
    assert dataset[np.int64(0)]["input_ids"].equal(dataset[0]["input_ids"])
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match=f"pack {index} of {len(dataset)}"):
            dataset[index]
    assert len(list(dataset)) == len(dataset)


def test_loader_workers_read_what_the_main_process_reads(caption_tars, packs, processor):
    dataset = PackedDataset(packs(caption_tars), processor)
    expected = [dataset[i] for i in range(len(dataset))]  # opens the files here before the workers start
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for item, reference in zip(loader, expected, strict=True):
        for name in ("input_ids", "position_ids", "labels", "pixel_values"):
            assert item[name].equal(reference[name])


def test_open_files_are_not_pickled_and_stay_few(write_tar, sample, packs, processor, monkeypatch):
    monkeypatch.setattr(reading, "OPEN_FILES", 3)
    shards = [write_tar(sample(f"{i}"), f"{i:02d}.tar") for i in range(8)]
    dataset = PackedDataset(packs(shards, shards_per_group=1), processor)
    before = len(os.listdir("/proc/self/fd"))
    assert all(len(dataset[i]["pixel_values"]) == 1 for _ in range(2) for i in range(8))
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 3
    clone = pickle.loads(pickle.dumps(dataset))  # what a spawned worker gets
    assert clone[3]["input_ids"].equal(dataset[3]["input_ids"])


def test_plan_and_tars_move_together(caption_tars, packs, processor, tmp_path):
    packs(caption_tars)
    shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "-moved"))  # keeps modification times
    moved = PackedDataset(tmp_path.with_name(tmp_path.name + "-moved") / "packs", processor)
    (tmp_path / "link").symlink_to(tmp_path / "packs")
    linked = PackedDataset(tmp_path / "link", processor)
    assert moved[0]["input_ids"].equal(linked[0]["input_ids"])


def picture(width, height, mode="RGB"):
    """A smooth picture without any symmetry, which JPEG keeps well."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([255 * x, 255 * y, 200 * x * (1 - y)], axis=-1).astype(np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray((255 * x * y).astype(np.uint8)))
    return image


GREY_STRIPES = np.tile(np.linspace(0, 65535, 40).astype(np.uint16), (40, 1))
EXIF_ROTATED = Image.Exif()
EXIF_ROTATED[0x0112] = 6  # the camera was held upright: turn by 90 degrees


@pytest.mark.parametrize(
    ("image", "image_format", "options"),
    [
        (Image.new("RGB", (1, 1), (10, 20, 30)), "PNG", {}),
        (Image.new("RGB", (1, 500), (10, 20, 30)), "PNG", {}),
        (Image.new("RGB", (500, 1), (10, 20, 30)), "PNG", {}),
        (Image.new("RGB", (40, 3), (10, 20, 30)), "PNG", {}),
        (picture(40, 30).quantize(16), "PNG", {}),
        (picture(40, 30).quantize(16), "PNG", {"transparency": 3}),
        (picture(40, 30, "RGBA"), "PNG", {}),
        (picture(40, 30, "LA"), "PNG", {}),
        (picture(40, 30, "L"), "JPEG", {}),
        (picture(40, 30, "CMYK"), "JPEG", {}),
        (Image.fromarray(GREY_STRIPES), "PNG", {}),
        (picture(40, 30).convert("1"), "PNG", {}),
        (picture(40, 20), "JPEG", {"exif": EXIF_ROTATED, "quality": 100}),
        (picture(40, 30), "WEBP", {}),
    ],
    ids=lambda value: f"{value.mode}-{value.size[0]}x{value.size[1]}" if isinstance(value, Image.Image) else None,
)
def test_unusual_images_are_read(write_tar, sample, encode, packs, processor, image, image_format, options):
    data = encode(image, image_format, **options)
    dataset = PackedDataset(packs([write_tar(sample("a", image=data))]), processor)
    item = dataset[0]
    assert item["dropped"] == {} and item["pixel_values"].shape == (1, 3, 32, 32)
    pixels = item["pixel_values"][0].permute(1, 2, 0).numpy().astype(float)
    expected = image.convert("RGB")
    if "exif" in options:
        expected = expected.transpose(Image.Transpose.ROTATE_270)
    if image.mode == "I;16":
        expected = Image.fromarray((GREY_STRIPES >> 8).astype(np.uint8)).convert("RGB")
    reference = np.asarray(expected.resize((32, 32), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(pixels - reference).mean() < (4 if image_format in ("JPEG", "WEBP") else 1)


def png_bomb(width, height):
    """A PNG whose header claims width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_bad_images_drop_their_whole_document(write_tar, sample, encode, packs, processor, caplog):
    whole = encode(picture(64, 64), "JPEG", quality=95)
    members = (
        sample("good1", "a cat")
        + sample("cut", "never seen", image=whole[: len(whole) // 2])
        + sample("text", "never seen", image=b"this is no image")
        + sample("pickle", "never seen", image=pickle.dumps({"a": 1}))
        + sample("bomb", "never seen", image=png_bomb(60_000, 60_000))
        + sample("large", "never seen", image=png_bomb(20_000, 5_000))
        + sample("good2", "a cat")
    )
    dataset = PackedDataset(packs([write_tar(members)], max_length=4096), processor)
    assert len(dataset) == 1
    with caplog.at_level(logging.WARNING):
        item = dataset[0]
    assert item["dropped"] == {"corrupt_image": 3, "image_too_large": 2}
    ids, labels = caption_document("a cat", processor.tokenizer, 4)
    assert [document[0].tolist() for document in documents_of(item)] == [ids.tolist()] * 2
    assert item["labels"].tolist() == labels.tolist() * 2
    assert len(item["pixel_values"]) == 2
    for key, reason in (("cut", "corrupt_image"), ("pickle", "corrupt_image"), ("bomb", "image_too_large")):
        assert f"00000.tar/{key}: {reason}" in caplog.text


def test_a_pack_without_readable_documents_is_empty(write_tar, sample, packs, processor):
    dataset = PackedDataset(packs([write_tar(sample("a", image=b"x") + sample("b", image=b"y"))]), processor)
    item = dataset[0]
    assert item["dropped"] == {"corrupt_image": 2}
    assert item["input_ids"].shape == item["labels"].shape == item["position_ids"].shape == (0,)
    assert item["pixel_values"].shape == (0, 3, 32, 32)
    assert item["pixel_values"].dtype == torch.uint8 and item["input_ids"].dtype == torch.int64
    batch = PackingCollator()([item])
    assert batch["packing_stats"]["dropped"] == {"corrupt_image": 2} and batch["packing_stats"]["tokens"] == 0


def test_special_tokens_in_captions_stay_text(write_tar, sample, packs, processor):
    caption = "a <|im_end|> b <|image_pad|> <s>"
    dataset = PackedDataset(packs([write_tar(sample("a", caption))]), processor)
    ids = dataset[0]["input_ids"].tolist()
    tokenizer = processor.tokenizer
    for token, count in (("<|im_end|>", 1), ("<|image_pad|>", 4), ("<s>", 1)):
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == count
    assert tokenizer.decode(ids[5:-1]) == "\n" + caption


def test_changes_behind_the_plan_drop_the_document(write_tar, sample, packs, processor):
    keys = ["good", "name", "size", "caption", "encoding", "blank"]
    tar = write_tar([member for key in keys for member in sample(key, "a photo of a cat")])
    dataset = PackedDataset(packs([tar]), processor)
    overwrite(tar, place(tar, "caption", "txt")[0], b"zqzq")
    overwrite(tar, place(tar, "encoding", "txt")[0], b"\xff")
    overwrite(tar, place(tar, "blank", "txt")[0], b" " * 16)
    overwrite(tar, place(tar, "size", "png")[0] - 512 + 124, b"00000000001\0")
    overwrite(tar, place(tar, "good", "png")[0] + 10**4, b"")
    overwrite(tar, next(s.members["png"][0] for s in index_shard(tar).samples if s.key == "name") - 512, b"NAM3")
    item = dataset[0]
    assert item["dropped"] == {
        "moved_member": 2,
        "changed_caption": 1,
        "bad_caption_encoding": 1,
        "empty_caption": 1,
    }
    assert len(documents_of(item)) == len(item["pixel_values"]) == 1


def test_what_does_not_match_the_plan_is_refused(caption_tars, packs, processor, tmp_path):
    folder = packs(caption_tars)
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens(["photo"])
    with pytest.raises(ValueError, match="planned with another tokenizer"):
        PackedDataset(folder, other)
    plan = json.loads((folder / "plan.json").read_text())

    def write_plan(**changes):
        (folder / "plan.json").write_text(json.dumps({**plan, **changes}))

    write_plan(format_version=1)
    with pytest.raises(ValueError, match="format version 1; this code reads 4: delete .* plan again with the same"):
        PackedDataset(folder, processor)
    write_plan()
    os.utime(caption_tars[1])
    with pytest.raises(ValueError, match="00001.tar has changed since it was planned \\(mtime_ns"):
        PackedDataset(folder, processor)
    with open(caption_tars[0], "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="00000.tar has changed since it was planned \\(size"):
        PackedDataset(folder, processor)
    caption_tars[0].unlink()
    with pytest.raises(ValueError, match="00000.tar of this plan is gone"):
        PackedDataset(folder, processor)
    (folder / "plan.json").unlink()
    with pytest.raises(ValueError, match="plan not finished; run open-qwen2vl pack again"):
        PackedDataset(folder, processor)
    with pytest.raises(ValueError, match="nowhere does not exist; a folder that"):
        PackedDataset(tmp_path / "nowhere", processor)


def test_figures_of_packs_come_from_one_file(caption_tars, packs, processor):
    """Beside the parts and equal to their columns: a run reads no part to start."""
    folder = packs(caption_tars, shards_per_group=1)
    dataset = PackedDataset(folder, processor)
    found = {name: dataset.per_pack(name).tolist() for name in FIGURES}
    assert found == {name: [row[name] for row in plan_rows(folder, "part")] for name in FIGURES}
    for part in folder.glob("part-*.arrow"):
        part.unlink()
    assert {name: PackedDataset(folder, processor).per_pack(name).tolist() for name in FIGURES} == found
    np.save(folder / FIGURES_NAME, np.load(folder / FIGURES_NAME)[:, 1:])
    with pytest.raises(ValueError, match="figures.npy is of another plan than plan.json beside it"):
        dataset.per_pack("tokens")


def test_a_saved_processor_has_the_plans_tokenizer(caption_tars, packs, processor, tmp_path):
    processor.save_pretrained(tmp_path / "model")
    folder = packs(caption_tars)
    assert len(PackedDataset(folder, type(processor).from_pretrained(tmp_path / "model"))) > 0
