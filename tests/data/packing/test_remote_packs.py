"""Packs of shards in a bucket, behind a network that delays, cuts, throttles, damages and hangs: the same as local."""

import fsspec
import pytest
import torch

from open_qwen2vl import PackedDataset, range_reads
from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.documents.documents import UNREACHABLE, UNREADABLE, Remote
from open_qwen2vl.data.storage.shard_cache import ShardCache
from tests.tars import write_caption_tar

CAPTIONS = [[f"picture {shard} {'of ' * (number % 4)}{number}" for number in range(6)] for shard in range(3)]


@pytest.fixture
def quick(monkeypatch):
    """Waits as short as those of a test."""
    for name, seconds in {"FIRST_WAIT": 0.01, "LONGEST_WAIT": 0.1, "SLOW": 0.2, "DEAD_PATIENCE": 0.05}.items():
        monkeypatch.setattr(range_reads, name, seconds)
    monkeypatch.setattr(range_reads, "_told", (float("-inf"), range_reads.ReadCounts()))


@pytest.fixture
def packs(tmp_path, bucket, proxy, processor):
    """The plan of three local tars, and that of the same in the bucket."""
    for number, captions in enumerate(CAPTIONS):
        write_caption_tar(tmp_path / f"{number}.tar", captions, seed=number)
    fs = fsspec.filesystem("s3")
    for number in range(len(CAPTIONS)):
        fs.put_file(str(tmp_path / f"{number}.tar"), f"{bucket}/{number}.tar")
    for name, folder in (("local", tmp_path), ("remote", bucket)):
        shards = [f"{folder}/{number}.tar" for number in range(len(CAPTIONS))]
        options = {"image_seq_length": 4, "max_length": 40, "num_workers": 1, "shards_per_group": 1}
        plan_packs(shards, tmp_path / name, processor.tokenizer, **options)
    return tmp_path


def assert_equal(dataset: PackedDataset, expected: PackedDataset) -> None:
    assert len(dataset) == len(expected) > 5
    for number in range(len(expected)):
        item, other = dataset[number], expected[number]
        assert not item["dropped"], item["dropped_places"]
        assert all(torch.equal(item[name], other[name]) for name in other if isinstance(other[name], torch.Tensor))


def test_a_pack_is_asked_for_in_one_go(packs, processor, proxy):
    remote = PackedDataset(packs / "remote", processor)
    proxy.faults.counts.clear()
    assert_equal(remote, PackedDataset(packs / "local", processor))
    # The members of each tar lie side by side, and a pack takes what lies side by side at once.
    assert proxy.faults.counts["whole"] < 2 * len(remote) + len(CAPTIONS) < sum(map(len, CAPTIONS)) * 2


def test_nothing_is_lost_to_faults_that_pass(packs, processor, proxy, quick):
    local = PackedDataset(packs / "local", processor)
    for fault, share in {"throttle": 0.4, "cut": 0.4, "hang": 0.2}.items():
        remote = PackedDataset(packs / "remote", processor)
        setattr(proxy.faults, fault, share)
        proxy.faults.coming = [fault]  # one at least
        assert_equal(remote, local)
        assert proxy.faults.counts[fault] > 0
        setattr(proxy.faults, fault, 0.0)
    assert range_reads.COUNTS.hedges > 0  # what hung was asked for a second time


def test_what_came_damaged_is_asked_for_again(packs, processor, proxy, monkeypatch):
    remote, local = PackedDataset(packs / "remote", processor), PackedDataset(packs / "local", processor)
    monkeypatch.setattr(proxy, "corrupt_at", 130)  # the size in the header of the first member
    proxy.faults.corrupt = 1.0
    assert sum(remote[0]["dropped"].values()) > 0
    proxy.faults.corrupt, proxy.faults.coming = 0.0, ["corrupt"]
    item = remote[0]
    assert proxy.faults.counts["corrupt"] > 1 and not item["dropped"]
    assert torch.equal(item["input_ids"], local[0]["input_ids"])


def test_a_store_that_is_dead_is_named_and_does_not_hold_up(packs, processor, proxy, quick, caplog):
    remote = PackedDataset(packs / "remote", processor, remote=Remote(patience=0.3))
    remote[0]  # sizes and times of its files are known
    proxy.faults.dead = True
    item = remote[0]
    assert set(item["dropped"]) == {UNREACHABLE} and len(item["input_ids"]) == 0
    assert "s3://" in item["dropped_places"][UNREACHABLE] and "remote reads:" in caplog.text
    proxy.faults.dead = False
    assert not remote[0]["dropped"]


def test_an_object_that_is_gone_is_dropped_at_once(packs, processor, proxy, bucket):
    remote = PackedDataset(packs / "remote", processor)
    fsspec.filesystem("s3").rm(f"{bucket}/1.tar")
    proxy.faults.counts.clear()
    dropped = [reason for number in range(len(remote)) for reason in remote[number]["dropped"]]
    assert set(dropped) == {UNREADABLE} and proxy.faults.counts["whole"] < 4 * len(remote)


def test_with_a_cache_each_shard_is_fetched_once(packs, processor, proxy, tmp_path):
    cache = ShardCache(tmp_path / "cache", 10**6)
    remote = PackedDataset(packs / "remote", processor, remote=Remote(cache=cache))
    proxy.faults.counts.clear()
    for _ in range(2):
        assert_equal(remote, PackedDataset(packs / "local", processor))
    assert proxy.faults.counts["whole"] == len(CAPTIONS)
    other = PackedDataset(
        packs / "remote", processor, files_checked=True, remote=Remote(cache=ShardCache(cache.folder, 10**6))
    )
    proxy.faults.dead = True
    assert_equal(other, PackedDataset(packs / "local", processor))
