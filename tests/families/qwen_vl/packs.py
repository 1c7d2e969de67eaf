"""Documents of tiny Qwen2-VL models, as the pipeline makes them, and their packs."""

import io
from collections import Counter

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from open_qwen2vl import PackingCollator
from open_qwen2vl.data.documents.items import ReadDocument, pack_item
from open_qwen2vl.families.interface import Media, VisionWork
from open_qwen2vl.families.qwen_vl.patch_embedding import normalised
from open_qwen2vl.families.qwen_vl.processing import QwenVLDocuments
from tests.clips import clip

SIZES = [(90, 60), (60, 200), (112, 112), (300, 40), (150, 170), (33, 35)]


def picture(width: int, height: int, seed: int = 0, format: str = "PNG") -> bytes:
    """An image file of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def noisy_clip(width: int, height: int, frames: int, seed: int = 0) -> bytes:
    """A clip of random colours in large blocks, so that no frame is like another."""
    blocks = np.random.default_rng(seed).integers(0, 256, (frames, -(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return clip(blocks.repeat(8, 1).repeat(8, 2)[:, :height, :width], 10)


def stock_pixels(patches: torch.Tensor, processor: ProcessorMixin) -> torch.Tensor:
    """uint8 patches of images as the stock image processor gives them: normalised in fp32, the frame doubled."""
    image = processor.image_processor
    statistics = [(255 * torch.tensor(values)).tolist() for values in (image.image_mean, image.image_std)]
    return normalised(patches, *statistics).unflatten(1, (3, 1, -1)).expand(-1, -1, 2, -1).flatten(1)


def make_document(documents: QwenVLDocuments, texts: list[str | tuple[int, ...]], seed: int = 0) -> dict:
    """One document of texts, of images given by their sizes, and of clips by width, height and frames at 10 a second;
    labels at all texts but the first token.
    """
    ids, labels, media = [], [], [documents.empty_media()]
    for number, entry in enumerate(texts):
        if isinstance(entry, str):
            new = documents.tokenizer(entry)["input_ids"]
            ids, labels = ids + new, labels + new
        else:
            if len(entry) == 3:
                data = noisy_clip(*entry, seed=100 * seed + number)
                item, _ = documents.describe_video(lambda limit, data=data: data[:limit])
            else:
                data, item = picture(*entry, seed=100 * seed + number), Media("image", *entry)
            new = documents.placeholder_ids(item)
            ids, labels = ids + new, labels + [-100] * len(new)
            media.append(documents.read_media(data, item))
    end = list(documents.text_format.document_end)
    input_ids, labels = np.array(ids + end), np.array(labels + end)
    labels[0] = -100
    tensors = {name: torch.cat([one[name] for one in media if name in one]) for name in media[0]}
    positions = documents.position_ids(input_ids, tensors)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        **tensors,
    }


def mixed_documents(documents: QwenVLDocuments) -> list[dict]:
    """Nine documents: texts, one image, two images, six sizes; a clip, and clips beside an image."""
    entries = [
        [SIZES[0], "a red house"],
        ["only some words here"],
        [SIZES[1], SIZES[2], "two of them"],
        ["before it ", SIZES[3], " and after"],
        [SIZES[4], "x"],
        ["y z"],
        [SIZES[5], "an image"],
        ["it ", (64, 48, 30), " moves"],
        [(40, 60, 20), SIZES[0], "three", (90, 30, 9), "the last"],
    ]
    return [make_document(documents, one, seed) for seed, one in enumerate(entries)]


def pack(rows: list[list[dict]], pad: int = 3) -> dict:
    """The batch of some packs; each row has a padded tail that is a document of its own."""
    length = pad + max(sum(len(document["input_ids"]) for document in row) for row in rows)
    batch = {"input_ids": [], "labels": [], "position_ids": []}
    lengths = []
    for row in rows:
        own = [len(document["input_ids"]) for document in row]
        tail = length - sum(own)
        lengths += [*own, tail]
        tails = {"input_ids": torch.zeros(tail, dtype=torch.long), "labels": torch.full((tail,), -100)}
        tails["position_ids"] = torch.arange(tail).expand(4, -1)
        for name, values in batch.items():
            values.append(torch.cat([*[document[name] for document in row], tails[name]], dim=-1))
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    flat = [document for row in rows for document in row]
    batch = {
        "input_ids": torch.stack(batch["input_ids"]),
        "labels": torch.stack(batch["labels"]),
        "position_ids": torch.stack(batch["position_ids"], dim=1),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    text = ("input_ids", "labels", "position_ids")
    media = {name: torch.cat([document[name] for document in flat]) for name in flat[0] if name not in text}
    return batch | {name: tensor for name, tensor in media.items() if len(tensor)}


def collated(documents: QwenVLDocuments, rows: list[list[dict]]) -> dict:
    """The batch of some packs as the pipeline makes it: grids on the host, placeholders found."""
    text = ("input_ids", "labels", "position_ids")
    items = []
    for row in rows:
        read = [
            ReadDocument(
                *(one[name].numpy() for name in text), {n: t for n, t in one.items() if n not in text}, 0, VisionWork()
            )
            for one in row
        ]
        items.append(pack_item(documents, read, Counter()))
    batch = PackingCollator()(items)
    del batch["packing_stats"]
    return batch
