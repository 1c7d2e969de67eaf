"""A tiny two-tower model of open_clip, and what is asked of score files."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
ANIMALS = ("cat", "two dogs", "a very small horse", "elephants at night", "fish", "my bird", "bees and a bear")
PREPROCESSING = {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}


def save_tiny_clip(folder: Path) -> Path:
    import open_clip

    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": TINY_CLIP, "preprocess_cfg": PREPROCESSING})
    )
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY_CLIP)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """Folder of a tiny random model, for `local-dir:`, with preprocessing of its own."""
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def photo(encode):
    """`photo(seed, width, height, format)`: an image file of smooth random colours."""

    def make(seed: int, width: int = 48, height: int = 40, image_format: str = "PNG") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        return encode(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC), image_format)

    return make


@pytest.fixture
def pool(tmp_path, make_tar, sample, photo) -> Path:
    """A folder of three tars of seven pairs, with uids."""
    folder = tmp_path / "pool"
    folder.mkdir()
    for shard in range(3):
        members = []
        for i in range(7):
            number = 7 * shard + i
            picture = photo(number, 30 + 9 * i, 60 - 5 * i, "PNG" if i % 2 else "JPEG")
            caption = f"{ANIMALS[i]} number {number}" + " and a tree" * shard
            members += sample(f"{i:04d}", caption, picture, f"{number:032x}")
        make_tar(folder / f"{shard:05d}.tar", members)
    return folder


def rows(path: Path) -> list[dict]:
    """The rows of a score file."""
    return pq.read_table(path).to_pylist()
