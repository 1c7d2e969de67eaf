import json
import math

import pytest
import torch

from open_qwen2vl.trainer.figures import steps
from open_qwen2vl.trainer.figures.loss_watch import FIRST_STEPS, LossStopped, LossWatch


def Step(number, **figures):
    """A step with labels."""
    return steps.Step(number, sources=[{"labels": 3, "tokens": 9, "packs": 1}], **figures)


def test_a_rise_above_the_running_average_is_wrong_and_noise_is_not():
    watch = LossWatch()
    for number in range(40):
        assert watch.verdict(Step(number, loss=2.0 + number % 2), 1.0) is None
    assert "the loss of step 41 is 4.0000, more than max_loss_rise (1)" in watch.verdict(Step(41, loss=4.0), 1.0)
    assert watch.verdict(Step(41, loss=4.0), 0) is None  # switched off
    assert 2 < watch.average < 3


def test_the_first_steps_may_do_anything_but_be_no_number():
    watch = LossWatch()
    for number in range(FIRST_STEPS):
        assert watch.verdict(Step(number, loss=100.0 * number), 1.0) is None
    assert "the loss of step 3 is nan" in LossWatch().verdict(Step(3, loss=math.nan), 0)
    assert "the grad_norm of step 3 is inf" in LossWatch().verdict(Step(3, grad_norm=math.inf), 0)


class Described(list):
    """Packs that know where they come from, as a `PackMixture` does."""

    def describe(self, pack):
        return {"source": "captions", "pack": pack, "documents": [("00000.tar", f"key{pack}")]}


@pytest.fixture
def numbered(packs):
    return Described({**pack, "pack": number} for number, pack in enumerate(packs))


def test_a_loss_that_is_no_number_names_its_samples_and_saves_nothing(make_trainer, numbered, tmp_path):
    trainer = make_trainer(
        train_dataset=numbered,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=1,
        logging_steps=100,
    )
    broken = 6
    images = sum(len(pack["pixel_values"]) for pack in numbered[4:broken])

    def break_one_image(module, args, output):
        if len(output) == sum(len(pack["pixel_values"]) for pack in numbered[4:]):
            output = output.clone()
            output[images] = torch.nan
        return output

    trainer.model.model.multi_modal_projector.register_forward_hook(break_one_image)
    with pytest.raises(LossStopped, match=r"the loss of step 2 is nan; worst packs: captions 6 \(loss nan, 1 samples"):
        trainer.train()
    run = tmp_path / "run"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    report = json.loads((run / "stopped-at-step-2.json").read_text())
    assert [pack["pack"] for pack in report["packs"]][0] == broken
    assert sorted(pack["pack"] for pack in report["packs"]) == [4, 5, 6, 7]
    assert report["packs"][0]["documents"] == [["00000.tar", "key6"]]
    assert sum(math.isnan(pack["loss"]) for pack in report["packs"]) == 1


def test_a_spike_stops_and_can_be_allowed(make_trainer, numbered):
    def with_a_spike(trainer):
        calls = []

        def scale(module, args, output):
            calls.append(1)
            if len(calls) == FIRST_STEPS + 5:
                output.last_hidden_state = output.last_hidden_state * 1e3

        trainer.model.model.language_model.register_forward_hook(scale)
        return trainer

    options = {"train_dataset": numbered, "max_steps": 30, "learning_rate": 1e-5}
    with pytest.raises(LossStopped, match="max_loss_rise"):
        with_a_spike(make_trainer(**options)).train()
    with_a_spike(make_trainer(**options, max_loss_rise=0)).train()
