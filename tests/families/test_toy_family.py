"""A toy family is planned, read, ordered and collated by what it tells of itself, and refused where it must be."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from open_qwen2vl import PackedDataset, PackingCollator
from open_qwen2vl.data import PackMixture, PackOrder, parse_sources, plan_packs
from open_qwen2vl.data.packing.plan_files import read_part_metadata
from open_qwen2vl.families import document_processor, register_family
from open_qwen2vl.families.interface import VisionWork
from tests.data.conftest import encode_image, write
from tests.families.toy_family import ToyDocuments, ToyProcessor

SIZES = [(8, 8), (16, 8), (24, 16), (40, 40), (96, 96)]
OPTIONS = {"max_length": 48, "num_workers": 1}


@pytest.fixture(scope="module", autouse=True)
def family():
    register_family("ToyProcessor", ToyDocuments, "toy")


@pytest.fixture(scope="module")
def toy(tokenizer):
    return ToyProcessor(tokenizer)


@pytest.fixture
def tar(tmp_path):
    """Captions of pictures of several sizes, one of them turned by EXIF, one too large for the family."""
    members = []
    for number, size in enumerate(SIZES):
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 2 else 1
        image = encode_image(Image.new("RGB", size, (number, 0, 0)), "JPEG", exif=exif, quality=100, subsampling=0)
        members += [(f"{number}.jpg", image), (f"{number}.txt", b"a cat")]
    return write(tmp_path / "a.tar", members)


def test_sizes_decide_lengths_and_the_plan_keeps_them(tar, toy, tmp_path):
    report = plan_packs([tar], tmp_path / "packs", toy, **OPTIONS)
    assert (report.documents, report.patches, report.skipped) == (4, 1 + 2 + 6 + 25, {"too_many_patches": 1})
    dataset = PackedDataset(tmp_path / "packs", toy)
    assert dataset.plan["vision"] == {"family": "toy", "patch": 8, "most": 64}
    text = len(toy.tokenizer("a cat")["input_ids"])
    documents = [document for i in range(len(dataset)) for document in dataset._documents(i)]
    assert {d["key"]: (d["images"][0]["width"], d["images"][0]["height"], d["tokens"]) for d in documents} == {
        "0": (8, 8, 1 + 2 + text + 1),
        "1": (16, 8, 2 + 2 + text + 1),
        "2": (16, 24, 6 + 2 + text + 1),
        "3": (40, 40, 25 + 2 + text + 1),
    }
    assert dataset.per_pack("patches").sum() == 34 and dataset.per_pack("labels").sum() == 4 * (text + 1)
    assert read_part_metadata(tmp_path / "packs/part-00000.arrow")["settings"]["vision"]["family"] == "toy"


def test_items_and_batches_have_the_familys_tensors_and_positions(tar, toy, tmp_path):
    plan_packs([tar], tmp_path / "packs", toy, **OPTIONS)
    dataset = PackedDataset(tmp_path / "packs", toy)
    items = [dataset[i] for i in range(len(dataset))]
    assert all(item["position_ids"].shape == (2, len(item["input_ids"])) for item in items)
    total = VisionWork(*map(sum, zip(*(item["vision_work"] for item in items), strict=True)))
    assert total == (34, 1 + 4 + 36 + 625, 34, 0) and sum(item["media"] for item in items) == 4
    assert sorted(np.concatenate([item["grids"].numpy() for item in items]).tolist()) == [
        [1, 1],
        [1, 2],
        [3, 2],
        [5, 5],
    ]
    labelled = torch.cat([item["labels"] for item in items])
    assert not set(labelled.tolist()) & {toy.tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "<|image_pad|>")}
    batch = PackingCollator()([items[0], dataset.empty_pack()])
    longest = len(items[0]["input_ids"])
    assert batch["position_ids"].shape == (2, 2, longest) and batch["input_ids"].shape == (2, longest)
    assert torch.equal(batch["position_ids"][:, 0], items[0]["position_ids"])
    assert torch.equal(batch["position_ids"][:, 1], torch.arange(longest).expand(2, -1))
    assert int((batch["position_ids"][0] == 0).sum()) == len(batch["cu_seq_lens_q"]) - 1
    assert torch.equal(batch["patches"], items[0]["patches"]) and torch.equal(batch["grids"], items[0]["grids"])
    stats = batch["packing_stats"]
    names = ("patches", "vision_squared", "vision_tokens", "vision_windowed")
    assert tuple(stats[name] for name in names) == items[0]["vision_work"]
    with pytest.raises(ValueError, match="one row of positions"):
        PackingCollator(cross_document_attention=True)(items[:1])


def test_conversations_through_a_template_whose_image_is_several_tokens(toy, tmp_path):
    Image.new("RGB", (24, 8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>what <|image_pad|> is it?"}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "conversations": turns}))
    plan_packs([tmp_path / "a.jsonl"], tmp_path / "packs", toy, images=[tmp_path], **OPTIONS)
    item = PackedDataset(tmp_path / "packs", toy)[0]
    start, pad, end, eos = toy.tokenizer.convert_tokens_to_ids(["<s>", "<|image_pad|>", "<|im_start|>", "<|im_end|>"])
    assert item["input_ids"][:5].tolist() == [start, pad, pad, pad, end]
    assert (item["input_ids"] == pad).sum() == 3
    labels = item["labels"][item["labels"] != -100]
    assert toy.tokenizer.decode(labels[:-1]) == "a cat" and labels[-1] == eos


def test_a_changed_image_or_another_processor_is_refused(tar, toy, tmp_path, processor, tokenizer, caplog):
    plan_packs([tar], tmp_path / "packs", toy, **OPTIONS)
    with pytest.raises(ValueError, match="planned with another processor: family toy, now open_qwen2vl"):
        PackedDataset(tmp_path / "packs", processor)
    assert PackedDataset(tmp_path / "packs", ToyProcessor(tokenizer, most=9)).documents.most == 64  # the plan's
    times, data = (tar.stat().st_atime_ns, tar.stat().st_mtime_ns), tar.read_bytes()
    tar.write_bytes(data.replace(b"\xff\xc0\x00\x11\x08\x00\x08\x00\x10", b"\xff\xc0\x00\x11\x08\x00\x10\x00\x08"))
    os.utime(tar, ns=times)
    dataset = PackedDataset(tmp_path / "packs", toy)
    dropped = [reason for i in range(len(dataset)) for reason in dataset[i]["dropped"]]
    assert dropped == ["image_changed"] and "a.tar/1: image_changed (its image: (8, 16), planned 16x8)" in caplog.text
    with pytest.raises(ValueError, match="object belongs to no known model family; known are OpenQwen2VLProcessor"):
        document_processor(object())
    with pytest.raises(ValueError, match="image_seq_length is no option of ToyProcessor; it has "):
        plan_packs([tar], tmp_path / "other", toy, image_seq_length=4, **OPTIONS)


def test_order_balances_patches_and_mixes_budgets_but_for_phases(tar, toy, tmp_path, tokenizer):
    for name, most in (("a", 64), ("b", 64), ("c", 9)):
        plan_packs([tar], tmp_path / name, ToyProcessor(tokenizer, most), **OPTIONS)

    def ordered(phases):
        entries = [{"path": str(tmp_path / name), **({"phase": phases[name]} if phases else {})} for name in "abc"]
        mixture = PackMixture(parse_sources(entries), toy)
        order = list(PackOrder(mixture, 1, 1, 4, seed=0))
        patches = np.append(mixture.patches_per_pack, [0, 0, 0])[order].reshape(-1, 4)
        assert (np.diff(patches, axis=1) <= 0).all()
        items = [mixture[index] for index in order]
        assert all(not item["dropped"] for item in items)
        stats = [PackingCollator()(items[i : i + 4])["packing_stats"]["patches"] for i in range(0, len(items), 4)]
        assert stats == patches.sum(1).tolist()
        return mixture, order

    mixture, order = ordered(None)
    assert mixture.phases == [[0, 1, 2]] and len(order) == -(-len(mixture) // 4) * 4
    mixture, order = ordered({"a": 2, "b": 2, "c": 1})
    first, others = len(mixture.datasets[2]), len(mixture) - len(mixture.datasets[2])
    assert mixture.phases == [[2], [0, 1]]  # c alone, then a and b together
    steps = -(-first // 4) * 4
    assert sorted(index for index in order[:steps] if index < len(mixture)) == list(range(others, len(mixture)))
    assert sorted(index for index in order[steps:] if index < len(mixture)) == list(range(others))
