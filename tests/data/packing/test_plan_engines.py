"""The same plan by several ranks and on Ray as by one process."""

import os
import subprocess
import sys

import pytest

from open_qwen2vl.data.packing.plan import plan_packs
from tests.data.packing.test_plan import OPTIONS, plan, read_bytes


def as_rank(monkeypatch, rank, ranks):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))


def test_the_last_of_several_ranks_finishes_the_plan(caption_tars, tmp_path, tokenizer, monkeypatch):
    whole = plan(caption_tars, tmp_path / "alone", tokenizer)
    as_rank(monkeypatch, 1, 2)
    assert plan(caption_tars, tmp_path / "packs", tokenizer) is None
    assert [path.name for path in sorted((tmp_path / "packs").glob("part-*"))] == ["part-00001.arrow"]
    as_rank(monkeypatch, 0, 2)
    for _ in range(2):  # the second time is a rank that finds all there as it ends
        assert plan(caption_tars, tmp_path / "packs", tokenizer) == whole
        assert read_bytes(tmp_path / "packs") == read_bytes(tmp_path / "alone")
    with pytest.raises(ValueError, match="--engine ray starts its own workers: run it without accelerate launch"):
        plan(caption_tars, tmp_path / "packs", tokenizer, engine="ray")


@pytest.mark.slow
def test_ranks_side_by_side_and_ray_make_the_same_bytes(caption_tars, tmp_path, backbones, tokenizer):
    pytest.importorskip("ray")
    plan(caption_tars, tmp_path / "alone", tokenizer)
    command = [sys.executable, "-m", "open_qwen2vl.cli", "pack", *map(str, caption_tars), "--num-workers", "1"]
    command += ["--tokenizer", str(backbones["text"]), "--image-seq-length", "4", "--max-length", "128"]
    command += ["--shards-per-group", "1", "--output", str(tmp_path / "ranks")]
    ranks = []
    try:
        for rank in range(2):
            environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        printed = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0] and any("packed" in text for text in printed)
    options = {**OPTIONS, "num_workers": 2, "engine": "ray"}
    plan_packs(caption_tars, tmp_path / "ray", tokenizer, **options)
    alone = read_bytes(tmp_path / "alone")
    assert read_bytes(tmp_path / "ranks") == alone and read_bytes(tmp_path / "ray") == alone
