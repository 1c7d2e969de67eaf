"""Documents and packs of caption documents for the tests of the model."""

import torch

from open_qwen2vl import PackingCollator
from tests.documents import caption_document


def make_document(tokenizer, caption: str, seed: int, image_seq_length: int = 4) -> dict:
    """One caption document about a random 32 px image, shaped like an item of a `PackedDataset`."""
    input_ids, labels = caption_document(caption, tokenizer, image_seq_length)
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.arange(len(input_ids)),
        "labels": torch.from_numpy(labels),
        "pixel_values": pixels,
        "image_seq_length": image_seq_length,
    }


def join(documents: list[dict]) -> dict:
    """A pack of documents, as a `PackedDataset` gives it."""
    keys = ("input_ids", "position_ids", "labels", "pixel_values")
    joined = {key: torch.cat([document[key] for document in documents]) for key in keys}
    return joined | {"image_seq_length": documents[0]["image_seq_length"]}


def forward_inputs(items: list[dict]) -> dict:
    """Arguments of a forward over these packs."""
    batch = PackingCollator()(items)
    batch.pop("packing_stats")
    return batch
