"""A training on shards in a bucket: the losses of one on a disk, through a bad network, with a cache and without."""

import fsspec
import pytest
from transformers import TrainerCallback

from open_qwen2vl import range_reads
from open_qwen2vl.data import PackMixture, parse_sources, plan_packs
from open_qwen2vl.data.documents.documents import RANGES, UNREACHABLE, Remote
from open_qwen2vl.data.packing.pack_order import PackOrder
from open_qwen2vl.data.storage.shard_cache import ShardCache
from open_qwen2vl.output_lock import only_writer
from open_qwen2vl.trainer.checkpoints.folders import newest_complete_checkpoint
from open_qwen2vl.trainer.loading import read_packs
from tests.tars import write_caption_tar

SHARDS = 4


@pytest.fixture
def plan(tmp_path, processor):
    """`plan(name, folder)`: the packs of the tars in a folder, a part each."""
    for number in range(SHARDS):
        captions = [f"picture {number} {'of ' * (sample % 3)}{sample}" for sample in range(5)]
        write_caption_tar(tmp_path / f"{number}.tar", captions, seed=number)

    def build(name: str, folder: object, remote: Remote = RANGES) -> PackMixture:
        shards = [f"{folder}/{number}.tar" for number in range(SHARDS)]
        options = {"image_seq_length": 4, "max_length": 40, "num_workers": 1, "shards_per_group": 1}
        plan_packs(shards, tmp_path / name, processor.tokenizer, **options)
        return PackMixture(parse_sources(str(tmp_path / name)), processor, remote=remote)

    return build


@pytest.fixture
def uploaded(plan, tmp_path, bucket, proxy, monkeypatch):
    """The bucket with the tars."""
    monkeypatch.setattr(range_reads, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(range_reads, "SLOW", 0.2)
    monkeypatch.setattr(range_reads, "ATTEMPT", 2.0)
    for number in range(SHARDS):
        fsspec.filesystem("s3").put_file(str(tmp_path / f"{number}.tar"), f"{bucket}/{number}.tar")
    return bucket


class AtStepEnd(TrainerCallback):
    """Calls a function with the number of each step."""

    def __init__(self, function):
        self.on_step_end = lambda args, state, control, **kwargs: function(state.global_step)


def losses(trainer) -> list[tuple[float, float]]:
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]


def test_the_same_losses_by_ranges_and_by_a_cache(make_trainer, plan, uploaded, proxy, tmp_path):
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "shuffle_window": 2}
    local = make_trainer(train_dataset=plan("local", tmp_path), **options)
    local.train()
    for remote in (RANGES, Remote(cache=ShardCache(tmp_path / "cache", 10**6))):
        packs = plan("remote", uploaded, remote)
        proxy.faults.throttle, proxy.faults.cut, proxy.faults.hang = 0.2, 0.2, 0.1
        trainer = make_trainer(train_dataset=packs, output_dir=str(tmp_path / "remote"), **options)
        trainer.train()
        proxy.faults.throttle = proxy.faults.cut = proxy.faults.hang = 0.0
        assert losses(trainer) == losses(local) and len(losses(local)) == 4


def test_a_dead_store_ends_in_a_checkpoint_and_the_rest_follows(make_trainer, plan, uploaded, proxy, monkeypatch):
    monkeypatch.setattr(range_reads, "DEAD_PATIENCE", 0.05)
    packs, options = plan("remote", uploaded, Remote(patience=0.3)), {"max_steps": 6, "save_strategy": "steps"}
    dies = AtStepEnd(lambda step: setattr(proxy.faults, "dead", step == 2))
    trainer = make_trainer(train_dataset=packs, callbacks=[dies], **options, save_steps=100)
    trainer.train()
    # The loader is a pack ahead.
    assert trainer.interrupted and trainer.state.global_step == 4
    checkpoint = newest_complete_checkpoint(trainer.args.output_dir)
    assert checkpoint.endswith("checkpoint-4")
    proxy.faults.dead = False
    again = make_trainer(train_dataset=packs, **options, save_steps=100)
    again.train(resume_from_checkpoint=True)
    assert not again.interrupted and again.state.global_step == 6
    assert losses(again)[:3] == losses(trainer)[:3]


def test_a_library_s_own_error_is_that_of_a_dead_store(plan, uploaded, monkeypatch, caplog):
    packs = plan("remote", uploaded)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "notaurl")  # found wrong by botocore when it first reads, by a ValueError
    fsspec.filesystem("s3").clear_instance_cache()
    assert packs.datasets[0][0]["dropped"].keys() == {UNREACHABLE}
    assert f"ValueError: Invalid endpoint: notaurl: '{uploaded}/" in caplog.text


def test_a_bucket_that_is_not_there_is_named(bucket):
    for url in (bucket, f"{bucket}/new/folder"):
        with only_writer(url):
            pass
    with pytest.raises(ValueError, match="s3://nobucket/x: there is no such bucket"):
        only_writer("s3://nobucket/x").__enter__()


def test_a_cache_for_files_of_this_machine_is_not_used_and_said(plan, arguments, processor, tmp_path, caplog):
    plan("local", tmp_path)
    read_packs(str(tmp_path / "local"), processor, arguments(cache_dir=str(tmp_path / "cache")))
    assert "cache_dir is not used: the files of local are on this machine" in caplog.text


@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_window_is_read_before_the_next(plan, tmp_path, window):
    packs = plan("local", tmp_path)
    ends, fetched = packs.datasets[0].part_ends, []
    packs.fetch_ahead = lambda some: fetched.append(some.tolist())
    order = PackOrder(packs, 1, 1, 1, seed=3, window=window)
    read = list(order)
    assert sorted(read) == list(range(len(packs))) and read == list(order)
    parts = [int(ends.searchsorted(pack, side="right")) for pack in read]
    windows = [parts[start:stop] for start, stop in _runs(parts, ends, window)]
    assert all(len(set(own)) <= window for own in windows)
    assert sum(fetched[: len(read)], []) == read  # each is told of once, and none is left out
    assert list(PackOrder(packs, 1, 1, 1, seed=4, window=window)) != read


def _runs(parts: list[int], ends, window: int) -> list[tuple[int, int]]:
    """Where windows begin and end: after all packs of `window` parts."""
    sizes, runs, start = [int(end) - int(ends[i - 1] if i else 0) for i, end in enumerate(ends)], [], 0
    while start < len(parts):
        seen = list(dict.fromkeys(parts[start:]))[:window]
        stop = start + sum(sizes[part] for part in seen)
        runs.append((start, stop))
        start = stop
    return runs
