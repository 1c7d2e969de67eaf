"""Tars and images made for the tests of the data steps."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def write(path: Path, members: Iterable[tuple[str, bytes | tarfile.TarInfo]], tar_format=tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def encode_image(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def make_sample(key: str, caption: str | bytes = "a cat", image: bytes | None = None, uid: str | None = None):
    """Members of one sample; without `image` a picture whose colour depends on the key."""
    color = np.frombuffer(key.encode().ljust(3, b"x")[-3:], np.uint8)
    image = encode_image(Image.new("RGB", (8, 8), tuple(int(c) for c in color))) if image is None else image
    members = [(f"{key}.png", image), (f"{key}.txt", caption if isinstance(caption, bytes) else caption.encode())]
    return members + ([(f"{key}.json", json.dumps({"uid": uid}).encode())] if uid is not None else [])


@pytest.fixture(scope="session")
def make_tar() -> Callable[..., Path]:
    """`make_tar(path, members, tar_format)`: a tar of (name, bytes or TarInfo)."""
    return write


@pytest.fixture
def write_tar(tmp_path) -> Callable[..., Path]:
    """`write_tar(members, name="00000.tar", tar_format=GNU)`: the same in `tmp_path`."""
    return lambda members, name="00000.tar", **options: write(tmp_path / name, members, **options)


@pytest.fixture(scope="session")
def sample() -> Callable[..., list[tuple[str, bytes]]]:
    """`sample(key, caption, image, uid)`: the members of one caption sample."""
    return make_sample


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """`encode(image, format, **options)`: an image file's bytes."""
    return encode_image


@pytest.fixture
def caption_tars(tmp_path) -> list[Path]:
    """Three tars of 40 samples whose captions differ in length."""
    random = np.random.default_rng(0)
    paths = []
    for shard in range(3):
        members = []
        for i in range(40):
            members += make_sample(f"{i:04d}", "cat " * int(random.integers(1, 30)) + str(i))
        paths.append(write(tmp_path / f"{shard:05d}.tar", members))
    return paths


@pytest.fixture(scope="session")
def tokenizer(processor):
    """The processor's own, so that its fingerprint is the plan's."""
    return processor.tokenizer
