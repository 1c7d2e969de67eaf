"""Documents and packs of caption documents for the tests of the model."""

from itertools import accumulate

import torch

from open_qwen2vl import PackingCollator
from open_qwen2vl.processing.text_formats import IMAGE_TOKEN
from tests.documents import caption_document


def make_document(tokenizer, caption: str, seed: int, image_seq_length: int = 4) -> dict:
    """One caption document about a random 32 px image, shaped like an item of a `PackedDataset`."""
    input_ids, labels = caption_document(caption, tokenizer, image_seq_length)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.arange(len(input_ids)),
        "labels": torch.from_numpy(labels),
        "pixel_values": pixels,
        "image_seq_length": image_seq_length,
        "placeholders": {"image_positions": torch.nonzero(torch.from_numpy(input_ids) == image_token_id).squeeze(1)},
    }


def join(documents: list[dict]) -> dict:
    """A pack of documents, as a `PackedDataset` gives it."""
    keys = ("input_ids", "position_ids", "labels", "pixel_values")
    joined = {key: torch.cat([document[key] for document in documents]) for key in keys}
    starts = accumulate((len(document["input_ids"]) for document in documents), initial=0)
    placed = [
        document["placeholders"]["image_positions"] + start for document, start in zip(documents, starts, strict=False)
    ]
    positions = {"image_positions": torch.cat(placed)}
    return joined | {"image_seq_length": documents[0]["image_seq_length"], "placeholders": positions}


def join_branches(documents: list[dict], prefix: int) -> dict:
    """A pack in which the others share the first document's picture and all else of its first positions."""
    first, *others = documents
    branches = [
        {name: tensor[prefix:] for name, tensor in other.items() if torch.is_tensor(tensor)} for other in others
    ]
    keys = ("input_ids", "position_ids", "labels")
    return first | {key: torch.cat([one[key] for one in (first, *branches)]) for key in keys}


def forward_inputs(items: list[dict]) -> dict:
    """Arguments of a forward over these packs."""
    batch = PackingCollator()(items)
    batch.pop("packing_stats")
    return batch
