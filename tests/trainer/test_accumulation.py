"""The micro-batches of a step come one by one, and losses and weights are those of the stock trainer's way."""

import time
from types import SimpleNamespace

import pytest
import torch

from open_qwen2vl import PackingCollator
from open_qwen2vl.data import PackMixture, PackOrder, parse_sources, plan_packs
from open_qwen2vl.trainer.accumulation import MicroBatches
from open_qwen2vl.trainer.loading import prefetch_factor
from tests.tars import break_images, write_caption_tar

STEP = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "max_steps": 3, "warmup_steps": 0}


class CollatorOfOnesOwn(PackingCollator):
    """Its labels may be any, so the trainer counts them itself, before the first forward: the stock way."""


@pytest.fixture
def mixture(tmp_path, processor):
    """`mixture(every, captions)`: packs of two or three captions; every so many-th image cannot be decoded."""

    def build(every=0, captions=36) -> PackMixture:
        write_caption_tar(
            tmp_path / "0.tar", [f"a photo of {'two dogs and ' * (i % 5)}a cat" for i in range(captions)]
        )
        if every:
            break_images(tmp_path / "0.tar", slice(None, None, every))
        options = {"image_seq_length": 4, "max_length": 48, "num_workers": 1}
        plan_packs([tmp_path / "0.tar"], tmp_path / "packs", processor.tokenizer, **options)
        return PackMixture(parse_sources(str(tmp_path / "packs")), processor)

    return build


def trained(make_trainer, data, collator=None, **options):
    """Loss, gradient norm and lost documents of each step, and the weights after the last."""
    trainer = make_trainer(train_dataset=data, **{**STEP, **options})
    trainer.data_collator = collator or trainer.data_collator
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    figures = [[log[name] for name in ("loss", "grad_norm", "dropped_documents")] for log in logs]
    return torch.tensor(figures), {name: value.detach() for name, value in trainer.model.named_parameters()}


def test_bit_equal_to_the_stock_way(make_trainer, mixture):
    data = mixture()
    figures, weights = trained(make_trainer, data)
    expected, expected_weights = trained(make_trainer, data, CollatorOfOnesOwn())
    assert torch.equal(figures, expected) and len(figures) == STEP["max_steps"]
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_documents_that_cannot_be_read_do_not_count(make_trainer, mixture, max_grad_norm):
    """SGD, so that weights show the size of the gradients."""
    data = mixture(every=3)
    options = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": max_grad_norm, "max_dropped_share": 1.0}
    figures, weights = trained(make_trainer, data, **options)
    expected, expected_weights = trained(make_trainer, data, CollatorOfOnesOwn(), **options)
    assert figures[:, 2].min() >= 1, "each step has lost some"
    torch.testing.assert_close(figures, expected, rtol=1e-5, atol=0)
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_labels_of_every_step_are_what_is_read(mixture):
    """Over epochs, phases and the empty packs at their ends."""
    data = mixture()
    order = PackOrder(data, 2, 1, 4, seed=3)
    for epoch in range(2):
        order.set_epoch(epoch)
        indices = list(order)
        for number, start in enumerate(range(0, len(indices), 8)):
            labels = sum(int((data[i]["labels"] != -100).sum()) for i in indices[start : start + 8])
            assert order.labels_of_step(epoch * len(indices) // 8 + number) == labels > 0


class Watched(PackMixture):
    """Counts what has been read when a micro-batch is computed."""

    read = 0

    def __getitem__(self, index):
        self.read += 1
        return super().__getitem__(index)


def test_at_most_two_micro_batches_are_there(make_trainer, mixture):
    data = mixture()
    data.__class__ = Watched
    ahead = []
    trainer = make_trainer(train_dataset=data, **STEP)
    trainer.model.register_forward_pre_hook(lambda *_: ahead.append(data.read - len(ahead)))
    trainer.train()
    assert len(ahead) == 12 and max(ahead) <= 2


class SlowPacks(PackMixture):
    """A pack takes as long to load as to compute: with two workers loading is half of computing."""

    def __getitem__(self, index):
        time.sleep(0.25)
        return super().__getitem__(index)


@pytest.mark.slow
def test_loading_hides_behind_computing(make_trainer, mixture):
    """Sleeps, not work; three steps of an epoch, and the first waits for the workers to start."""
    data = mixture(captions=96)
    data.__class__ = SlowPacks
    trainer = make_trainer(
        train_dataset=data, gradient_accumulation_steps=8, max_steps=5, dataloader_num_workers=2, warmup_steps=0
    )
    trainer.model.register_forward_pre_hook(lambda *_: time.sleep(0.25))
    trainer.train()
    assert trainer.state.epoch <= 1
    waits = [log["data_wait"] for log in trainer.state.log_history if "loss" in log][1:]
    assert len(waits) == 4 and sum(waits) / len(waits) < 0.03


def test_prefetching_is_bounded_by_shared_memory(mixture, arguments, monkeypatch):
    data, args = mixture(), arguments(**STEP, dataloader_num_workers=1)
    assert prefetch_factor(args, data) == 4
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    assert prefetch_factor(args, data) == 2
    assert prefetch_factor(arguments(dataloader_num_workers=1, dataloader_prefetch_factor=7), data) == 7
    assert prefetch_factor(arguments(dataloader_num_workers=0), data) is None


def test_a_loader_that_ends_early_is_an_error():
    batches = MicroBatches(iter([1, 2]), 3, lambda seconds: None)
    assert len(batches) == 3
    with pytest.raises(RuntimeError, match="fewer batches"):
        list(batches)


def test_labels_that_no_plan_knows_are_an_error(make_trainer, mixture):
    """As of a data set that changes what a plan describes."""
    data = mixture()
    data.__dict__["labels_per_pack"] = data.labels_per_pack + 1
    with pytest.raises(RuntimeError, match=r"step 1 has \d+ labels, its plan says \d+"):
        trained(make_trainer, data)
