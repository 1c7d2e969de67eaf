import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from open_qwen2vl import PackingCollator
from open_qwen2vl.data import PackMixture, parse_sources, plan_packs
from open_qwen2vl.trainer import PackedTrainingArguments, newest_complete_checkpoint, save_final_model
from tests.tars import write_caption_tar

PARTS = {"train_projector": "projector", "train_language_model": "language_model", "train_vision_tower": "vision"}


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def losses(trainer):
    return [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]


def part_of(name):
    return "vision" if "vision_tower" in name else "projector" if "projector" in name else "language_model"


class StopAt(TrainerCallback):
    """The power cut of these tests: an exception in the middle of training."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("trained", [{"projector"}, {"language_model"}, {"vision"}, {"projector", "language_model"}])
def test_only_the_chosen_parts_change(make_trainer, trained):
    trainer = make_trainer(
        weight_decay=0.1, max_steps=2, **{argument: part in trained for argument, part in PARTS.items()}
    )
    before = weights(trainer)
    trainer.train()
    changed = {name for name, parameter in weights(trainer).items() if not torch.equal(parameter, before[name])}
    assert {part_of(name) for name in changed} == trained
    matrices = {name for name, parameter in before.items() if parameter.ndim > 1 and part_of(name) in trained}
    assert matrices <= changed


def test_nothing_to_train_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to train"):
        PackedTrainingArguments(str(tmp_path), train_projector=False, train_language_model=False)


@pytest.mark.parametrize("option", [{"label_smoothing_factor": 0.1}, {"remove_unused_columns": True}])
def test_options_that_would_corrupt_the_loss_are_errors(tmp_path, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        PackedTrainingArguments(str(tmp_path), **option)


def test_weight_decay_shrinks_matrices_and_nothing_else(make_trainer):
    trainer = make_trainer(
        weight_decay=0.5, learning_rate=0.1, warmup_steps=0, lr_scheduler_type="constant", train_vision_tower=True
    )
    before = weights(trainer)
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    for name, parameter in weights(trainer).items():
        kept = 1 - 0.1 * 0.5 if parameter.ndim > 1 else 1
        torch.testing.assert_close(parameter, before[name] * kept, rtol=1e-6, atol=0, msg=name)
    assert any(p.ndim > 2 for p in before.values()) and any(p.ndim == 1 and p.any() for p in before.values())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Warm-up over 2 of 10 steps; the zeros before the first and after the last step are not trained with.
        ("linear", [0.5, 1, *(left / 9 for left in range(8, 0, -1))]),
        ("constant_with_warmup", [0.5, *[1] * 9]),
        ("constant", [1] * 10),
    ],
)
def test_no_step_has_a_learning_rate_of_zero(make_trainer, schedule, expected):
    trainer = make_trainer(lr_scheduler_type=schedule, warmup_steps=2, learning_rate=1e-3, max_steps=10)
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert rates == pytest.approx([1e-3 * factor for factor in expected])


def test_the_cosine_ends_next_to_zero(make_trainer):
    trainer = make_trainer(max_steps=20, warmup_steps=0.1)
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert max(rates) == 1e-3 and 0 < rates[-1] < 2e-5 < rates[0] and rates[2:] == sorted(rates[2:], reverse=True)


def test_the_cache_is_off_in_both_configs(make_trainer):
    config = make_trainer().model.config
    assert (config.use_cache, config.text_config.use_cache) == (False, False)


@pytest.mark.parametrize("split", [(2, 4), (1, 8)])
def test_accumulation_splits_change_nothing(make_trainer, packs, split):
    """All eight packs are one step, however they are split; plain SGD makes weights show the gradients."""
    labels = [int((pack["labels"] != -100).sum()) for pack in packs]
    assert len(set(labels)) > 4 and 0 in labels
    runs = []
    for batch_size, accumulation in [(8, 1), split]:
        trainer = make_trainer(
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.05,
            max_steps=3,
        )
        trainer.train()
        runs.append((losses(trainer), weights(trainer), trainer.throughput.totals))
    (whole, whole_weights, whole_totals), (parts, parts_weights, parts_totals) = runs
    assert [loss for _, loss in parts] == pytest.approx([loss for _, loss in whole], rel=1e-5)
    for name, parameter in parts_weights.items():
        torch.testing.assert_close(parameter, whole_weights[name], rtol=1e-4, atol=1e-6, msg=name)
    assert all(parts_totals[name] == whole_totals[name] for name in ("tokens", "documents", "images", "flops"))


def test_the_loss_is_the_mean_over_labels(make_trainer, packs):
    trainer = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1)
    batch = PackingCollator()(packs)
    batch.pop("packing_stats")
    expected = trainer.model(**batch).loss.item()
    trainer.train()
    assert losses(trainer)[0][1] == pytest.approx(expected, rel=1e-5)


def test_activation_checkpointing_changes_no_loss(make_trainer):
    plain, checkpointed = make_trainer(), make_trainer(activation_checkpointing=True)
    for trainer in (plain, checkpointed):
        trainer.train()
    assert checkpointed.model.is_activation_checkpointing
    for (_, loss), (_, expected) in zip(losses(checkpointed), losses(plain), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("parts", [{}, {"train_language_model": False}, {"train_vision_tower": True}])
def test_batches_without_images_labels_or_documents_train(make_trainer, make_pack, parts):
    odd = [
        make_pack(2, with_images=False),
        make_pack(2, supervised=False),
        make_pack(2, with_images=False, supervised=False),
        make_pack(0, with_images=False, dropped={"corrupt_image": 3}),
    ]
    trainer = make_trainer(train_dataset=odd, max_steps=8, weight_decay=0.1, **parts)
    trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    values = [loss for _, loss in losses(trainer)]
    # In each of the two epochs three of the four packs have nothing to predict.
    assert sum(loss == 0 for loss in values) == 6 and all(loss >= 0 for loss in values)


def test_resume_continues_with_the_very_same_losses(make_trainer, packs, tmp_path):
    """Killed after step 7 of 10, in the second epoch; saves (4) and logs (3) fall on different steps."""
    packs = [{**pack, "dropped": {"corrupt_image": i, "moved_member": 1}} for i, pack in enumerate(packs)]
    options = {
        "train_dataset": packs,
        "gradient_accumulation_steps": 2,
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 3,
        "weight_decay": 0.1,
        "max_dropped_share": 1,
    }
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    output_dir = str(tmp_path / "cut")
    cut = make_trainer(output_dir=output_dir, callbacks=[StopAt(7)], **options)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    checkpoint = newest_complete_checkpoint(output_dir)
    assert Path(checkpoint).name == "checkpoint-4"
    resumed = make_trainer(output_dir=output_dir, **options)
    resumed.train(resume_from_checkpoint=checkpoint)

    assert losses(resumed) == losses(whole)
    assert [step for step, _ in losses(whole)] == [3, 6, 9, 10]
    for name, parameter in weights(resumed).items():
        assert torch.equal(parameter, weights(whole)[name]), name
    expected, summary = whole.summary(), resumed.summary()
    for name in ("steps", "epochs", "tokens", "documents", "images", "flops", "final_loss", "dropped_documents"):
        assert summary[name] == expected[name], name
    # 20 micro-batches: twice all eight packs and half of a third epoch.
    assert summary["dropped_documents"]["moved_member"] == 20
    assert whole.state.total_flos == resumed.state.total_flos == summary["flops"]
    assert summary["train_seconds"] > 0


def test_a_second_train_call_starts_its_counts_anew(make_trainer):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    first = trainer.summary()
    trainer.train()
    assert trainer.summary()["tokens"] == first["tokens"]


def test_incomplete_checkpoints_are_passed_over(make_trainer, tmp_path, caplog):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    assert newest_complete_checkpoint(trainer.args.output_dir) is None
    trainer.train()
    run = Path(trainer.args.output_dir)
    assert newest_complete_checkpoint(run) == str(run / "checkpoint-4")
    state = run / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-10")
    (run / "checkpoint-10" / "trainer_state.json").unlink()
    (run / "checkpoint-old").mkdir()
    with caplog.at_level(logging.WARNING):
        assert newest_complete_checkpoint(run) == str(run / "checkpoint-2")
    assert "checkpoint-10 is incomplete" in caplog.text and "checkpoint-4 is incomplete" in caplog.text
    assert newest_complete_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_loss_is_per_label_whatever_the_batches(make_trainer, packs, batch_size):
    packs = [{**pack, "dropped": {"corrupt_image": 1}} for pack in packs]
    trainer = make_trainer(eval_dataset=packs, per_device_eval_batch_size=batch_size)
    sums, count = 0.0, 0
    for pack in packs:
        batch = PackingCollator()([pack])
        batch.pop("packing_stats")
        labels = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            sums += trainer.model(**batch).loss.item() * labels
        count += labels
    head_calls = []
    trainer.model.lm_head.register_forward_hook(lambda *_: head_calls.append(1))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(sums / count, rel=1e-5)
    assert metrics["eval_dropped_documents"] == 8
    assert not head_calls, "evaluation of the loss built logits"
    assert trainer.throughput.totals["tokens"] == 0 and trainer.throughput.dropped == {}


def test_the_final_model_loads_with_the_auto_classes_and_generates_with_a_cache(make_trainer, processor):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "model"
    folder.mkdir(parents=True)
    (folder / "stale.txt").write_text("of an older model")
    save_final_model(trainer, folder)
    assert (folder / "model.safetensors").exists() and not list(folder.glob("*.bin"))
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in folder.parent.iterdir() if path.name != ".lock"] == ["model"]

    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert AutoProcessor.from_pretrained(folder).image_seq_length == 4
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights(trainer)[name]), name
    calls = []
    model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.generate(input_ids=torch.tensor([[4, 10, 11]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert calls == [3, 1, 1], "generation without a cache reads the whole text again for each token"


@pytest.mark.parametrize(("compiled", "lengths"), [(False, None), (True, {64})])
def test_packs_are_padded_to_one_length_for_a_compiler(make_trainer, tmp_path, processor, compiled, lengths):
    write_caption_tar(tmp_path / "0.tar", ["a photo of a cat", "two dogs"] * 9)
    plan_packs(
        [tmp_path / "0.tar"], tmp_path / "packs", processor.tokenizer, image_seq_length=4, max_length=64, num_workers=1
    )
    packs = PackMixture(parse_sources(str(tmp_path / "packs")), processor)
    trainer = make_trainer(train_dataset=packs, torch_compile=compiled)
    found = {batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()}
    assert found == lengths if compiled else max(found) < 64
