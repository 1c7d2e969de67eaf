"""Shards of a bucket on a disk: bounded, shared, whole, and the bucket's own."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from open_qwen2vl.data.storage import shard_cache
from open_qwen2vl.data.storage.shard_cache import ShardCache
from open_qwen2vl.places import place

SIZE = 1000


@pytest.fixture
def shards(memory):
    """Three shards with their identities; their ETags are MD5s, as of S3."""
    made = []
    for number in range(3):
        content = bytes([number]) * SIZE
        (place(memory) / f"{number}.tar").write_bytes(content)
        made.append((f"{memory}/{number}.tar", {"size": SIZE, "etag": hashlib.md5(content).hexdigest()}))
    return made


def kept(cache: ShardCache) -> int:
    return len(list(cache.folder.glob("*.shard")))


def read(cache: ShardCache, shard: tuple) -> bytes:
    with cache.open(*shard) as file:
        return file.read_at(SIZE + 1, 0)


def test_what_was_read_longest_ago_goes(tmp_path, shards):
    cache = ShardCache(tmp_path / "cache", 2 * SIZE)
    file = cache.open(*shards[0])
    for shard in (shards[1], shards[0], shards[2]):
        time.sleep(0.01)  # a clock that some file systems round
        assert read(cache, shard)[0] == shards.index(shard)
    names = {cache._path(*shard).name for shard in (shards[0], shards[2])}
    assert {path.name for path in cache.folder.glob("*.shard")} == names
    cache.max_bytes = SIZE
    assert read(cache, shards[1]) == bytes([1]) * SIZE and kept(cache) == 1
    assert file.read_at(SIZE, 0) == bytes(SIZE)  # who has it open reads on


def test_many_at_a_time_fetch_once(tmp_path, shards, monkeypatch):
    fetched, copy = [], shard_cache._copy
    monkeypatch.setattr(
        shard_cache, "_copy", lambda url, *rest: (fetched.append(url), time.sleep(0.05), copy(url, *rest))
    )
    caches = [ShardCache(tmp_path / "cache", 10 * SIZE) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(read, caches, [shards[0], shards[1]] * 4))
    assert found == [bytes([number % 2]) * SIZE for number in range(8)] and len(fetched) == 2


def test_what_comes_damaged_is_fetched_again(tmp_path, shards, monkeypatch):
    cache, (url, identity) = ShardCache(tmp_path / "cache", 10 * SIZE), shards[0]
    copies, copy = [], shard_cache._copy_once

    def damaged(url, size, file):
        digest = copy(url, size, file)
        copies.append(digest)
        if len(copies) < 3:
            os.pwrite(file, bytes([9 * len(copies)]), 7)
            return f"{len(copies):032x}"
        return digest

    monkeypatch.setattr(shard_cache, "_copy_once", damaged)
    assert read(cache, shards[0]) == bytes(SIZE) and len(copies) == 3
    # An ETag that looks like an MD5 and is none: what comes twice alike is right.
    monkeypatch.setattr(shard_cache, "_copy_once", copy)
    assert read(cache, (url, identity | {"etag": "0" * 32})) == bytes(SIZE)
    assert read(cache, (url, identity | {"etag": "0" * 32 + "-2"})) == bytes(SIZE)


def test_other_bytes_each_time_are_an_error(tmp_path, shards, monkeypatch):
    cache, digests = ShardCache(tmp_path / "cache", 10 * SIZE), iter("abc")
    monkeypatch.setattr(shard_cache, "_copy_once", lambda *_: next(digests))
    with pytest.raises(OSError, match="0.tar: other bytes came each of 3 times"):
        cache.open(*shards[0])
    assert kept(cache) == 0 and not list(cache.folder.glob("*.tmp"))


def test_errors_name_the_shard(tmp_path, shards, memory):
    cache = ShardCache(tmp_path / "cache", SIZE - 1)
    with pytest.raises(OSError, match="0.tar: its 1,000 bytes are more than the whole cache of 999 bytes"):
        cache.open(*shards[0])
    with pytest.raises(FileNotFoundError, match="no such file.*9.tar"):
        cache.open(f"{memory}/9.tar", {"size": 5, "etag": "x"})
    assert not [path for path in cache.folder.iterdir() if not path.name.startswith("lock")]


def test_what_killed_processes_left_makes_room(tmp_path, shards):
    cache = ShardCache(tmp_path / "cache", 2 * SIZE)
    left = cache.folder / f"{'0' * 32}.shard.{2**22 + 1}.tmp"  # no process has such a number
    left.write_bytes(bytes(2 * SIZE))
    assert read(cache, shards[0]) == bytes(SIZE) and not left.exists()


def test_shards_are_fetched_ahead(tmp_path, shards):
    cache = ShardCache(tmp_path / "cache", 10 * SIZE)
    cache.fetch_ahead(shards)
    cache._fetching.join(60)
    assert kept(cache) == 3
    for url, _ in shards:
        place(url).unlink()
    assert [read(cache, shard)[0] for shard in shards] == [0, 1, 2]
