"""Trainings on mixtures: loss weights of sources, and schedules that a resumed run follows."""

import pytest
import torch

from open_qwen2vl import PackingCollator
from open_qwen2vl.data import PackMixture, parse_sources, plan_packs
from tests.tars import write_caption_tar
from tests.trainer.test_packed_trainer import StopAt, losses, weights


@pytest.fixture
def mixture(tmp_path, processor):
    """`mixture(cats, dogs)`: two plans of captions, with these keys of their sources."""
    for name, captions in (("cats", ["a cat on a mat", "a cat"] * 9), ("dogs", ["two dogs run in the park"] * 12)):
        write_caption_tar(tmp_path / f"{name}.tar", captions)
        options = {"image_seq_length": 4, "max_length": 32, "num_workers": 1}
        plan_packs([tmp_path / f"{name}.tar"], tmp_path / name, processor.tokenizer, **options)

    def build(cats, dogs) -> PackMixture:
        keys = {"cats": cats, "dogs": dogs}
        return PackMixture(
            parse_sources([{"path": str(tmp_path / name), **own} for name, own in keys.items()]), processor
        )

    return build


class CollatorOfOnesOwn(PackingCollator):
    """Chooses its labels itself, for all that the trainer knows."""


@pytest.mark.parametrize("batch_size", [1, 2])
def test_labels_count_as_the_loss_weights_say(make_trainer, mixture, batch_size):
    """Gradients of a step of SGD are those of the weighted sum; `loss/NAME` stays what the model has."""
    data = mixture({"loss_weight": 3}, {})
    options = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 1, "max_grad_norm": 0.0, "warmup_steps": 0}
    options |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
    trainer = make_trainer(train_dataset=data, lr_scheduler_type="constant", **options)
    before = weights(trainer)
    trainer.train()
    (log,) = (log for log in trainer.state.log_history if "loss" in log)

    reference = make_trainer(train_dataset=data)
    items = [data[index] for index in list(trainer._order)[:4]]
    assert {item["source"] for item in items} == {0, 1}
    total, labels, by_source = 0, 0, [0.0, 0.0]
    for item in items:
        batch = PackingCollator()([{k: v for k, v in item.items() if k != "loss_weight"}])
        labels += batch.pop("packing_stats")["rows"][0]["labels"]
        loss = reference.model(**batch, num_items_in_batch=1).loss
        by_source[item["source"]] += loss.item()
        total = total + data.loss_weights[item["source"]] * loss
    (total / labels).backward()
    assert log["loss"] == pytest.approx(total.item() / labels, rel=1e-5)
    counted = [sum(int((i["labels"] != -100).sum()) for i in items if i["source"] == s) for s in (0, 1)]
    for name, loss, count in zip(("cats", "dogs"), by_source, counted, strict=True):
        assert log[f"loss/{name}"] == pytest.approx(loss / count, rel=1e-5)
    for name, parameter in reference.model.named_parameters():
        if parameter.grad is not None:
            expected = before[name] - 0.05 * parameter.grad
            torch.testing.assert_close(weights(trainer)[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_a_schedule_is_resumed_with_the_very_same_losses(make_trainer, mixture, tmp_path):
    """Killed within the first of several epochs; the second source comes late and is read at most once."""
    data = mixture({"weight": {0: 1, 0.5: 1, 1: 0.2}}, {"weight": {0: 0, 0.5: 0, 1: 1}, "max_epochs": 1})
    options = {"train_dataset": data, "max_steps": 14, "save_strategy": "steps", "save_steps": 4}
    options["per_device_train_batch_size"] = 2
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    assert whole.state.epoch > 1
    cut = make_trainer(output_dir=str(tmp_path / "cut"), callbacks=[StopAt(11)], **options)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = make_trainer(output_dir=str(tmp_path / "cut"), **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(weights(resumed)[name], value) for name, value in weights(whole).items())
    sources = whole.summary()["sources"]
    assert 0 < sources["dogs"]["packs"] <= len(data.datasets[1]) < sources["cats"]["packs"]
    shares = [log["share/dogs"] for log in whole.state.log_history if "loss" in log]
    assert shares[5] == 0 < shares[-1], "not before the middle"


def test_what_has_no_effect_is_refused(make_trainer, mixture):
    with pytest.raises(ValueError, match="eval_packs take no loss_weight, max_epochs or schedule"):
        make_trainer(eval_dataset=mixture({"weight": {0: 1, 1: 2}}, {"weight": 1}))
    data = mixture({"loss_weight": 3}, {})
    from open_qwen2vl import PackedTrainer

    trainer = make_trainer()
    with pytest.raises(ValueError, match="loss_weight of a source needs the default collator"):
        PackedTrainer(trainer.model, trainer.args, CollatorOfOnesOwn(), train_dataset=data)
    with pytest.raises(ValueError, match="the run reads 400 packs, more than max_epochs allows"):
        limits = {"weight": 1, "max_epochs": 1}
        make_trainer(train_dataset=mixture(limits, limits), max_steps=400)
