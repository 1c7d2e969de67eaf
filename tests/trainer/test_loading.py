"""What a rank does before it has read its first pack: one of them looks at the plan's files, and all know."""

import os
from types import SimpleNamespace

import pytest

from open_qwen2vl import cli
from open_qwen2vl.trainer import loading
from tests.tars import write_caption_tar


@pytest.fixture
def packs(tmp_path, backbones) -> str:
    (tmp_path / "tars").mkdir()
    for number in range(3):
        write_caption_tar(tmp_path / "tars" / f"{number}.tar", ["a cat", "two dogs"])
    options = ["--tokenizer", backbones["text"], "--image-seq-length", "4", "--max-length", "40", "--num-workers", "1"]
    assert cli.main(["pack", str(tmp_path / "tars"), "--output", str(tmp_path / "packs"), *options]) == 0
    return str(tmp_path / "packs")


@pytest.fixture
def as_rank(monkeypatch):
    """`as_rank(number)` plays one of two ranks, one after the other; the tars that it looked at are its result."""
    told, looked = [], []
    stat = os.stat

    def look(path, *args, **kwargs):
        if str(path).endswith(".tar"):
            looked.append(os.path.basename(path))
        return stat(path, *args, **kwargs)

    def broadcast(objects):
        told.extend(objects)
        objects[:] = told[:1]

    def play(number: int) -> list[str]:
        monkeypatch.setattr(loading, "PartialState", lambda: SimpleNamespace(is_main_process=number == 0))
        looked.clear()
        return looked

    monkeypatch.setattr(loading, "broadcast_object_list", broadcast)
    monkeypatch.setattr(os, "stat", look)
    return play


def test_one_rank_looks_at_the_files_of_a_plan(packs, processor, as_rank):
    looked = as_rank(0)
    assert len(loading.read_packs(packs, processor)) and looked == ["0.tar", "1.tar", "2.tar"]
    looked = as_rank(1)
    assert len(loading.read_packs(packs, processor)) and looked == []


def test_all_ranks_know_of_a_changed_file(packs, processor, as_rank, tmp_path):
    os.utime(tmp_path / "tars" / "1.tar", (0, 0))
    messages = []
    for rank in (0, 1):
        as_rank(rank)
        with pytest.raises(ValueError, match="1.tar has changed since it was planned") as error:
            loading.read_packs(packs, processor)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
