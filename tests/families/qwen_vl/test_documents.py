"""Every kind of document by the pipeline, planned, read and collated: packed equals the stock model on each alone."""

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl import PackedDataset, PackingCollator, cli, prepare_for_packing
from open_qwen2vl.families.interface import Media
from tests.families.qwen_vl.packs import SIZES, picture

PART = {"type": "image"}


def animated(format: str) -> bytes:
    """A file of two frames, of which the first counts."""
    file, frames = io.BytesIO(), [Image.new("RGB", (90, 60), color) for color in ("red", "blue")]
    frames[0].save(file, format, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    return file.getvalue()


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def turn(role: str, *parts: dict) -> dict:
    return {"role": role, "content": list(parts)}


ANSWER = turn("assistant", text("a cat"))
# Images, by number, and what stands around them; 4 and 5 are animated, 6 is broken, 7 no image at all.
INTERLEAVED = [
    ([0, 1, 2], ["before ", None, " between ", None, None, " and after"]),
    ([], ["only words, and more of them"]),
    ([3], [None, "a long one"]),
    ([4, 5], [None, " moves, ", None, " too"]),
    ([6], [None, "broken"]),
]
CONVERSATIONS = [
    (
        [0, 1, 2],
        [turn("user", PART, text("like "), PART, text("?")), ANSWER, turn("user", text("this "), PART), ANSWER],
    ),
    ([], [turn("user", text("no image")), ANSWER]),
    ([3], [turn("system", text("Be short.")), turn("user", PART, text("what?")), ANSWER]),
    ([7], [turn("user", PART, text("what?")), ANSWER]),
    (["http://127.0.0.1:9/cat.png"], [turn("user", PART, text("what?")), ANSWER]),
]


@pytest.fixture(
    scope="module",
    params=["qwen2_vl", *(pytest.param(one, marks=pytest.mark.slow) for one in ("qwen2_5_vl", "qwen3_vl"))],
)
def planned(request, tmp_path_factory, qwen_vl_folder) -> tuple[Path, Path]:
    """A checkpoint, and a folder with `interleaved` and `conversations`."""
    folder, model = tmp_path_factory.mktemp("documents"), qwen_vl_folder(request.param)
    images = [picture(*SIZES[number], seed=number) for number in range(4)]
    images += [animated("GIF"), animated("WEBP"), picture(90, 60)[:2000], b"no image"]
    (folder / "images").mkdir()
    for number, content in enumerate(images):
        (folder / "images" / f"{number}.png").write_bytes(content)
    rows = []
    for numbers, entries in INTERLEAVED:
        names = iter([f"{number}.png" for number in numbers])
        rows.append({"texts": entries, "images": [None if entry else next(names) for entry in entries]})
    (folder / "interleaved.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [
        {"messages": messages, "images": [one if isinstance(one, str) else f"{one}.png" for one in numbers]}
        for numbers, messages in CONVERSATIONS
    ]
    (folder / "conversations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("interleaved", "conversations"):
        files = [str(folder / f"{name}.jsonl"), "--images", str(folder / "images"), "--output", str(folder / name)]
        options = ["--processor", str(model), "--max-length", "160", "--num-workers", "1"]
        assert cli.main(["pack", *files, *options]) == 0
    return model, folder


def skipped(plan: Path) -> dict[str, int]:
    return json.loads((plan / "plan.json").read_text())["totals"]["skipped"]


def test_what_cannot_be_taken_is_counted_in_planning_or_at_reading(planned):
    """An address is never fetched; a header that is whole in front of half a picture shows when it is read."""
    model, folder = planned
    assert skipped(folder / "interleaved") == {}
    reasons = skipped(folder / "conversations")
    rows = pq.read_table(folder / "conversations" / "skipped-00000.parquet").to_pylist()
    assert sum(reasons.values()) == len(rows) == 2 and reasons["corrupt_image"] == 1, reasons
    assert {row["reason"] for row in rows} == set(reasons)
    dropped = [item["dropped"] for item in PackedDataset(folder / "interleaved", AutoProcessor.from_pretrained(model))]
    assert [reason for pack in dropped for reason in pack] == ["corrupt_image"]


@pytest.mark.parametrize("attention", ["packed_varlen", "sdpa", "eager"])
@pytest.mark.parametrize("kind", ["interleaved", "conversations"])
def test_packed_equals_alone(planned, kind, attention):
    """Set after `prepare_for_packing`; losses of all packs against those of the stock model on each document."""
    model, folder = planned
    processor, stock = AutoProcessor.from_pretrained(model), AutoModelForImageTextToText.from_pretrained(model)
    packs = PackedDataset(folder / kind, processor)
    items = [packs[index] for index in range(len(packs))]
    batch = PackingCollator()(items)
    batch.pop("packing_stats")
    prepared = prepare_for_packing(AutoModelForImageTextToText.from_pretrained(model), processor)
    prepared.set_attn_implementation(attention)
    labels = int((batch["labels"] != -100).sum())
    with torch.no_grad():
        found = prepared(**batch, num_items_in_batch=labels).loss
        expected = sum(alone(stock, processor, item, labels) for item in items)
    torch.testing.assert_close(found, torch.as_tensor(expected), atol=1e-5, rtol=1e-5)


def alone(stock, processor, item: dict, labels: int) -> torch.Tensor:
    """Sum over a pack's documents of the stock model's losses, each by itself and in the stock processor's pixels."""
    starts = (item["position_ids"][0] == 0).nonzero().flatten().tolist()
    mean, std = (
        torch.tensor(values)[:, None] * 255
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    image_token, merge = processor.image_token_id, processor.image_processor.merge_size**2
    patches, grids, total = item["pixel_values"], item["image_grid_thw"], 0
    for start, stop in zip(starts, [*starts[1:], len(item["input_ids"])], strict=True):
        ids = item["input_ids"][None, start:stop]
        inputs = {"input_ids": ids, "labels": item["labels"][None, start:stop]}
        left = int((ids == image_token).sum()) * merge
        number = int((grids.prod(1).cumsum(0) <= left).sum()) if left else 0
        if number:
            pixels = (patches[:left].unflatten(1, (3, -1)).float() - mean) / std
            inputs["pixel_values"] = pixels[:, :, None].expand(-1, -1, 2, -1).flatten(1)
            inputs["image_grid_thw"], inputs["mm_token_type_ids"] = grids[:number], (ids == image_token).int()
        patches, grids = patches[left:], grids[number:]
        total = total + stock(**inputs, num_items_in_batch=labels).loss
    assert not len(patches) and not len(grids)
    return total


def test_an_animated_picture_is_its_first_frame(planned):
    model, folder = planned
    documents = PackedDataset(folder / "interleaved", AutoProcessor.from_pretrained(model)).documents
    media, red = Media("image", 90, 60), io.BytesIO()
    Image.new("RGB", (90, 60), "red").save(red, "PNG")
    expected = documents.read_media(red.getvalue(), media)["pixel_values"]
    for name in ("4.png", "5.png"):
        found = documents.read_media((folder / "images" / name).read_bytes(), media)["pixel_values"]
        assert torch.equal(found, expected), name
