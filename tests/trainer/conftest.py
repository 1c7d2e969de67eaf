"""Packs made in memory, with the items that a `PackedDataset` has, and trainers on the tiny model."""

import random
from functools import partial

import numpy as np
import pytest
import torch

from open_qwen2vl import PackedTrainer, PackedTrainingArguments
from tests.documents import caption_document

WORDS = "a photo of two dogs in the park blue green red circles and squares on mat".split()


def build_pack(tokenizer, documents, seed=0, with_images=True, supervised=True, dropped=None):
    """One pack of random captions, each with a random 32 px image of 4 tokens or without."""
    rng = random.Random(seed)
    captions = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(documents)]
    rows = [caption_document(caption, tokenizer, 4 * with_images) for caption in captions]
    nothing = np.zeros(0, dtype=np.int64)
    pixels = torch.Generator().manual_seed(seed)
    labels = torch.from_numpy(np.concatenate([labels for _, labels in rows] or [nothing]))
    return {
        "input_ids": torch.from_numpy(np.concatenate([ids for ids, _ in rows] or [nothing])),
        "labels": labels if supervised else torch.full_like(labels, -100),
        "position_ids": torch.from_numpy(np.concatenate([np.arange(len(ids)) for ids, _ in rows] or [nothing])),
        "pixel_values": torch.randint(
            0, 256, (documents * with_images, 3, 32, 32), dtype=torch.uint8, generator=pixels
        ),
        "image_seq_length": 4,
        "vision_work": (documents * with_images, documents * with_images, 4 * documents * with_images),
        "dropped": dropped or {},
    }


@pytest.fixture(scope="session")
def make_pack(tokenizer):
    """`make_pack(documents, seed, with_images, supervised, dropped)`: one item of a data set."""
    return partial(build_pack, tokenizer)


@pytest.fixture(scope="session")
def packs(make_pack):
    """Eight packs of 1 to 5 documents, so that label counts differ; one without images, one without labels."""
    items = [make_pack(1 + 7 * i % 5, seed=i) for i in range(8)]
    items[2] = make_pack(3, seed=2, with_images=False)
    items[5] = make_pack(2, seed=5, supervised=False)
    return items


@pytest.fixture
def arguments(tmp_path):
    """`arguments(**changes)`: quick and quiet arguments on the CPU."""

    def build(**changes):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_num_workers": 0,
            "save_strategy": "no",
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "max_steps": 4,
        }
        return PackedTrainingArguments(**{**defaults, **changes})

    return build


@pytest.fixture
def make_trainer(backbones, processor, arguments, packs):
    """`make_trainer(**arguments)`: a trainer of a fresh tiny model on `packs`."""
    from open_qwen2vl import OpenQwen2VLForConditionalGeneration

    def build(train_dataset=packs, eval_dataset=None, callbacks=None, **changes):
        torch.manual_seed(0)
        return PackedTrainer(
            model=OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, image_seq_length=4),
            args=arguments(**changes),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            callbacks=callbacks,
        )

    return build
