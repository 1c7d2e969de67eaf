"""How often a pack asks the disk: once a sample whose members lie side by side, and with the same items as ever."""

import io
import json
import os
import random
import tarfile

import pytest
import torch
from PIL import Image

from open_qwen2vl import PackedDataset
from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.documents import records
from open_qwen2vl.data.storage import tars
from open_qwen2vl.data.storage.open_files import NOTHING

SAMPLES = 5


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (40, 30), random.Random(number).randbytes(3600)).save(file, "PNG")
    return file.getvalue()


def caption(key: str, number: int) -> list[tuple[str, bytes]]:
    uid = json.dumps({"uid": f"{number:032x}"}).encode()
    return [(f"{key}.png", png(number)), (f"{key}.json", uid), (f"{key}.txt", f"picture {number}".encode())]


def interleaved(key: str, number: int) -> list[tuple[str, bytes]]:
    """An image before its record and two behind it."""
    images = [(f"{key}.{name}.png", png(number)) for name in "abc"]
    record = {"texts": [None, "then", None, None], "images": ["a.png", None, "b.png", "c.png"]}
    return [images[0], (f"{key}.json", json.dumps(record).encode()), *images[1:]]


def far_apart(samples: list) -> list:
    """The first members of all samples, then the second ones, and so on, more than a gap between them."""
    columns = enumerate(zip(*samples, strict=True))
    return [[(f"x{number}.dat", bytes(tars.MAX_GAP_BYTES)), *members] for number, members in columns]


# What a sample is, how the tar is laid out, and how many reads a sample takes, together and one by one.
LAYOUTS = {
    "side by side": (caption, lambda samples: samples, 1, 2),
    "text first": (caption, lambda samples: [sample[::-1] for sample in samples], 1, 2),
    "far apart": (caption, far_apart, 2, 2),
    "interleaved": (interleaved, lambda samples: samples, 1, 4),
    "interleaved, far apart": (interleaved, far_apart, 4, 4),
}


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path, processor):
    """A data set of one tar, and the reads that a sample takes, together and one by one."""
    sample, arrange, *reads = LAYOUTS[request.param]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for members in arrange([sample(f"{number:05d}", number) for number in range(SAMPLES)]):
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    options = {"image_seq_length": 4, "max_length": 128, "num_workers": 1}
    plan_packs([tmp_path / "0.tar"], tmp_path / "packs", processor.tokenizer, **options)
    return PackedDataset(tmp_path / "packs", processor), *reads


@pytest.fixture
def reads(monkeypatch):
    """Sizes of all reads at a location."""
    sizes, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: sizes.append(size) or pread(file, size, offset))
    return sizes


def items(dataset: PackedDataset) -> list[dict]:
    return [dataset[number] for number in range(len(dataset))]


def test_members_side_by_side_are_one_read(layout, reads, monkeypatch):
    dataset, at_once, one_by_one = layout
    together = items(dataset)
    assert len(reads) == at_once * SAMPLES and not any(item["dropped"] for item in together)
    reads.clear()
    monkeypatch.setattr(records, "read_together", lambda *_: NOTHING)
    apart = items(dataset)
    assert len(reads) == one_by_one * SAMPLES
    for one, other in zip(together, apart, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one if isinstance(one[name], torch.Tensor))


def test_too_much_is_not_read_at_once(layout, reads, monkeypatch):
    monkeypatch.setattr(tars, "MAX_SPAN_BYTES", 1024)
    assert not any(item["dropped"] for item in items(layout[0]))
    assert len(reads) > SAMPLES and max(reads) < 2 * tars.MAX_GAP_BYTES


def test_a_member_that_moved_is_dropped(layout):
    """What was read at once is checked as it was."""
    dataset, *_ = layout
    path = dataset.folder.parent / "0.tar"
    times = path.stat()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"00002.txt", b"00009.txt").replace(b"00002.c.png", b"00009.c.png"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    dropped = sum((list(item["dropped"]) for item in items(dataset)), [])
    assert dropped == ["moved_member"]
