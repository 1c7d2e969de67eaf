"""Micro-batches go to the device one by one: on any device the same values, on a GPU beside what it computes."""

import weakref

import pytest
import torch
from transformers import Trainer

from open_qwen2vl.trainer import accumulation
from open_qwen2vl.trainer.accumulation import DeviceCopies
from tests.trainer.test_accumulation import STEP, CollatorOfOnesOwn, mixture  # noqa: F401


def batch(number: int, megabytes: int = 0) -> dict:
    pixels = torch.full((1, max(1, megabytes << 20)), number, dtype=torch.uint8)
    return {"pixel_values": pixels, "image_grid_thw": [[1, 2, number]], "max_length_q": number}


def mean_pixel(inputs: dict) -> float:
    """Tells batches apart."""
    return float(inputs["pixel_values"].float().mean())


def test_only_tensors_are_copied():
    given = batch(3)
    copied = DeviceCopies(torch.device("meta"))(given)
    assert copied["pixel_values"].is_meta and not given["pixel_values"].is_meta
    assert {**copied, "pixel_values": 0} == {**given, "pixel_values": 0}


class OnDevice(DeviceCopies):
    """Copies of a device's own, which a CPU shares with its host, and how many batches of them there are."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.copies, self.most, self.order = [], 0, []

    def __call__(self, given):
        copied = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in super().__call__(given).items()
        }
        self.copies.append(weakref.ref(copied["pixel_values"]))
        self.most = max(self.most, sum(one() is not None for one in self.copies))
        self.order.append(mean_pixel(copied))
        return copied


@pytest.mark.parametrize("collator", [None, CollatorOfOnesOwn()], ids=["planned labels", "counted labels"])
def test_one_by_one_with_the_same_values(make_trainer, mixture, collator):  # noqa: F811
    """Where the labels of a step are counted before its first forward its micro-batches wait on the host."""
    data, weights = mixture(), []
    for copies in (OnDevice(), None):
        trainer = make_trainer(train_dataset=data, **STEP)
        trainer.data_collator = collator or trainer.data_collator
        seen = []
        trainer.model.register_forward_pre_hook(
            lambda _, __, inputs, seen=seen: seen.append(mean_pixel(inputs)), with_kwargs=True
        )
        trainer._copies = copies or trainer._copies
        trainer.train()
        if copies is not None:
            assert copies.order == seen and len(seen) == 4 * STEP["max_steps"] and copies.most <= 2
        weights.append({name: value.detach() for name, value in trainer.model.named_parameters()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_batches_of_a_training_stay_on_the_host(make_trainer, mixture, monkeypatch):  # noqa: F811
    """accelerate's loader would copy them when they are fetched."""
    devices, run_epoch = [], Trainer._run_epoch

    def noted(self, *args, **kwargs):
        devices.append(kwargs["train_dataloader"].device)
        return run_epoch(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_run_epoch", noted)
    trainer = make_trainer(train_dataset=mixture(), **STEP)
    assert trainer.get_train_dataloader().device == trainer.args.device
    trainer.train()
    assert devices and set(devices) == {None}


class Recorded:
    """Stands for streams and events of a GPU and notes what is asked of them."""

    def __init__(self, monkeypatch):
        self.log, self.events, recorder = [], 0, self
        note = self.log.append

        class Event:
            def __init__(self, blocking):
                self.number, recorder.events = recorder.events, recorder.events + 1

            def synchronize(self):
                note(f"wait for event {self.number}")

        class Stream:
            def __init__(self, name):
                self.name = name

            def record_event(self, event):
                note(f"event {event.number}")
                return event

            def wait_stream(self, other):
                note(f"{self.name} waits for {other.name}")

            def __enter__(self):
                note(f"on {self.name}:")

            def __exit__(self, *error):
                pass

        def send(given, device, non_blocking):
            note(f"copy {given['max_length_q']}, non_blocking {non_blocking}")
            return given

        computing = Stream("computing")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(accumulation, "send_to_device", send)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: note(f"kept for {stream.name}"))


def test_a_third_batch_comes_when_the_first_is_done(monkeypatch):
    """The order of what a GPU is asked, without one: event `n` is behind the computing of batch `n - 1`."""
    recorded = Recorded(monkeypatch)
    copies = DeviceCopies(torch.device("cuda", 0))
    for number in range(3):
        copies(batch(number))
    expected = []
    for number in range(3):
        expected += [f"wait for event {number - 1}", f"event {number}", "on copies:"]
        expected += [f"copy {number}, non_blocking True", "computing waits for copies", "kept for computing"]
    assert recorded.log == expected[1:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_beside_computing_on_a_gpu():
    """Values are whole although the device is busy, and of five batches at most two have memory."""
    copies, size, sums = DeviceCopies(torch.device("cuda")), 64, []
    square = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for number in range(5):
        host = {**batch(number, size), "pixel_values": batch(number, size)["pixel_values"].pin_memory()}
        on_device = copies(host)
        for _ in range(20):
            torch.mm(square, square)
        sums.append(on_device["pixel_values"].sum(dtype=torch.int64))
        del on_device
    # A product of the square is there too.
    assert torch.cuda.max_memory_allocated() - before < (2 * size + 2 * 64 + 16) << 20
    assert [int(one) for one in sums] == [number * (size << 20) for number in range(5)]
