"""Qwen2-VL for the other benchmarks: a small random model at the real vocabulary, its batches, reading of images."""

import io
import time

import numpy as np
import torch
from photo_packs import photograph
from PIL import Image
from transformers import (
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

from open_qwen2vl import prepare_for_packing
from open_qwen2vl.families.qwen_vl.images import image_patches
from open_qwen2vl.families.qwen_vl.positions import mrope_positions
from open_qwen2vl.families.qwen_vl.sizes import ImageSizes
from open_qwen2vl.processing.images import decode_pixels

# Pixels of the images of 20 captions: any size and aspect, 14 to 221 tokens.
SIZES = [(224, 224), (320, 240), (120, 300), (448, 336), (100, 100), (640, 200), (200, 420), (336, 336), (256, 170)]
IMAGE, START, END, END_OF_TEXT = 151655, 151652, 151653, 151643
RELEASED_PIXELS = (3_136, 12_845_056)


def make_model(packed: bool) -> PreTrainedModel:
    """A 6-layer ViT of width 192 and a 6-layer Qwen2 of width 512 with 151,936 rows; all of it trains."""
    text = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
    }
    vision = {"depth": 6, "embed_dim": 192, "hidden_size": 512, "num_heads": 3}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").train()
    return prepare_for_packing(model) if packed else model


def make_documents(text_lengths: list[int]) -> list[dict]:
    """Captions of random text, each with an image of another size."""
    torch.manual_seed(1)
    sizes, documents = ImageSizes(14, 2, *RELEASED_PIXELS), []
    for number, length in enumerate(text_lengths):
        rows, columns = sizes.grid(*SIZES[number % len(SIZES)])
        image = torch.tensor([START, *[IMAGE] * (rows * columns // 4), END])
        text = torch.cat([torch.randint(0, 150_000, (length + 1,)), torch.tensor([END_OF_TEXT])])
        documents.append(
            {
                "input_ids": torch.cat([image, text]),
                "labels": torch.cat([torch.full_like(image, -100), text]),
                "grid": torch.tensor([[1, rows, columns]]),
                "patches": torch.randint(0, 256, (rows * columns, 588), dtype=torch.uint8),
            }
        )
    return documents


def packed_batch(documents: list[dict]) -> dict:
    """All documents in one row, as the pipeline gives them."""
    positions = [
        torch.from_numpy(mrope_positions(d["input_ids"].numpy(), IMAGE, d["grid"].numpy(), 2)) for d in documents
    ]
    lengths = torch.tensor([len(document["input_ids"]) for document in documents])
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    labels = torch.cat([document["labels"] for document in documents])[None]
    input_ids = torch.cat([document["input_ids"] for document in documents])
    return {
        "input_ids": input_ids[None],
        "labels": labels,
        "label_positions": torch.nonzero(labels[0, 1:] != -100).squeeze(1),
        "position_ids": torch.cat(positions, dim=1)[:, None],
        "pixel_values": torch.cat([document["patches"] for document in documents]),
        "image_grid_thw": torch.cat([document["grid"] for document in documents]).tolist(),
        "image_positions": torch.nonzero(input_ids == IMAGE).squeeze(1),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }


def padded_batch(documents: list[dict]) -> dict:
    """A document a row, as the stock processor and collator give them: floats, a mask, two frames."""
    processor = Qwen2VLImageProcessor()
    mean, std = (torch.tensor(values)[:, None] * 255 for values in (processor.image_mean, processor.image_std))
    patches = torch.cat([document["patches"] for document in documents]).unflatten(1, (3, -1)).float()
    ids, labels = ([document[name] for document in documents] for name in ("input_ids", "labels"))
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=END_OF_TEXT)
    lengths = torch.tensor([len(one) for one in ids])
    return {
        "input_ids": input_ids,
        "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "mm_token_type_ids": (input_ids == IMAGE).int(),
        "pixel_values": ((patches - mean) / std)[:, :, None].expand(-1, -1, 2, -1).flatten(1),
        "image_grid_thw": torch.cat([document["grid"] for document in documents]),
        "use_cache": False,
    }


def image_rows(sizes: list[tuple[int, int]], repeats: int = 40) -> list[str]:
    """Lines of a table: the stock image processor against ours, CPU time of one core after decoding."""
    stock, ours = Qwen2VLImageProcessor(max_pixels=RELEASED_PIXELS[1]), ImageSizes(14, 2, *RELEASED_PIXELS)
    rows = [
        "Qwen2-VL, any resolution: images per CPU second of one core from a decoded photograph to patches, and the",
        "bytes that go to the device. Values are equal after the device has normalised them.",
        "",
        "| photograph | tokens | stock processor | ours | gain | with decoding | stock MB | ours |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for width, height in sizes:
        data = photograph(width, height, seed=width)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        ways = {
            "stock": lambda image=image: stock(image, return_tensors="pt")["pixel_values"],
            "ours": lambda image=image: image_patches(np.array(image), ours),
            "decoded": lambda data=data: image_patches(decode_pixels(data), ours),
        }
        # In turn, so that other work on the machine meets all of them alike.
        rounds = [{name: _seconds(way) for name, way in ways.items()} for _ in range(repeats)]
        best = {name: min(one[name] for one in rounds) for name in ways}
        stock_mb, our_mb = (ways[name]().nbytes / 2**20 for name in ("stock", "ours"))
        rows.append(
            f"| {width} x {height} | {ours.tokens(width, height)} | {1 / best['stock']:.0f} | {1 / best['ours']:.0f} "
            f"| {best['stock'] / best['ours']:.2f} | {1 / best['decoded']:.0f} | {stock_mb:.2f} | {our_mb:.2f} |"
        )
    return rows


def _seconds(way) -> float:
    start = time.process_time()
    way()
    return time.process_time() - start
