"""Qwen2-VL's, 2.5's and 3's documents from files to batches, through the planner and the dataset of every family."""

import json

import pytest
import torch

from open_qwen2vl import PackedDataset, PackingCollator
from open_qwen2vl.data import plan_packs
from tests.data.conftest import write
from tests.families.qwen_vl.packs import SIZES, picture
from tests.qwen_vl import FAMILIES, make_processor, make_tokenizer

OPTIONS = {"max_length": 512, "num_workers": 1}


@pytest.fixture(params=FAMILIES)
def processor(request, tmp_path):
    return make_processor(request.param, make_tokenizer(tmp_path))


def test_captions_are_planned_by_their_size_and_read_as_planned(processor, tmp_path):
    members = [m for n, size in enumerate(SIZES) for m in ((f"{n}.png", picture(*size, n)), (f"{n}.txt", b"a cat"))]
    report = plan_packs([write(tmp_path / "a.tar", members)], tmp_path / "packs", processor, **OPTIONS)
    assert (report.documents, report.skipped) == (len(SIZES), {})
    dataset = PackedDataset(tmp_path / "packs", processor)
    batch = PackingCollator()([dataset[i] for i in range(len(dataset))])
    assert batch["position_ids"].shape == (4, *batch["input_ids"].shape)
    assert batch["packing_stats"]["patches"] == report.patches == len(batch["pixel_values"])
    assert len(batch["image_grid_thw"]) == len(SIZES) and batch["packing_stats"]["dropped"] == {}
    stock = processor(text=["<|vision_start|><|image_pad|><|vision_end|>a cat<|endoftext|>"],
                      images=[picture_of(SIZES[0])], return_tensors="pt")  # fmt: skip
    assert any(torch.equal(document, stock["input_ids"][0]) for document in documents_of(batch))


def test_a_conversation_has_the_ids_of_the_stock_processor(processor, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(*SIZES[0]))
    turns = [{"from": "human", "value": "<image>what is it?"}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "conversations": turns}))
    plan_packs([tmp_path / "a.jsonl"], tmp_path / "packs", processor, images=[tmp_path], **OPTIONS)
    item = PackedDataset(tmp_path / "packs", processor)[0]
    content = [{"type": "image", "image": picture_of(SIZES[0])}, {"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]  # fmt: skip
    stock = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert item["input_ids"].tolist() == stock["input_ids"][0].tolist()
    assert torch.equal(item["image_grid_thw"], stock["image_grid_thw"])


def picture_of(size):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(picture(*size))).convert("RGB")


def documents_of(batch):
    ends = batch["cu_seq_lens_q"].long()
    return [batch["input_ids"].flatten()[a:b] for a, b in zip(ends, ends[1:], strict=False)]
