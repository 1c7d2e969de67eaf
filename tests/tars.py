"""Caption tars for tests, written as img2dataset writes them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_caption_tar(path: Path, captions: list[str], seed: int = 0, size: tuple[int, int] = (24, 40)) -> None:
    """A WebDataset tar of random JPEGs (height, width) with these captions (`key.jpg`, `key.txt`, `key.json`)."""
    generator = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions):
            picture = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(picture, "JPEG")
            uid = json.dumps({"uid": f"{number:032x}"})
            for ext, content in (("jpg", picture.getvalue()), ("txt", caption.encode()), ("json", uid.encode())):
                info = tarfile.TarInfo(f"{number:05d}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def break_images(tar: Path, which: slice = slice(None)) -> None:
    """Write zeros over these images, in place: the tar is as long and as old as it was."""
    with tarfile.open(tar) as archive:
        images = [(member.offset_data, member.size) for member in archive if member.name.endswith(".jpg")]
    with open(tar, "r+b") as file:
        for offset, size in images[which]:
            file.seek(offset)
            file.write(bytes(size))
