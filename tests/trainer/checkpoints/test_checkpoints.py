"""Checkpoints are complete or absent, and only the same run goes on from them."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from open_qwen2vl.trainer import newest_complete_checkpoint
from open_qwen2vl.trainer.checkpoints.folders import CheckpointError, checkpoints_by_step, prune

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "logging_steps": 4}


def losses(trainer):
    return [(log["step"], log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


class AtStep(TrainerCallback):
    """Calls a function when a step begins."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function()


def test_sigterm_saves_a_checkpoint_and_leaves(make_trainer, tmp_path):
    whole = make_trainer(**SAVING, output_dir=str(tmp_path / "whole"))
    whole.train()
    terminate = AtStep(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    cut = make_trainer(**SAVING, output_dir=str(tmp_path / "cut"), callbacks=[terminate])
    cut.train()
    assert cut.interrupted and cut.state.global_step == 3
    assert signal.getsignal(signal.SIGTERM) is before
    assert list(checkpoints_by_step(tmp_path / "cut")) == [2, 3]

    resumed = make_trainer(**SAVING, output_dir=str(tmp_path / "cut"))
    resumed.train(resume_from_checkpoint=True)
    assert not resumed.interrupted
    # The same logs too: the window that SIGTERM fell into is not cut in two.
    assert losses(resumed) == losses(whole) and [step for step, *_ in losses(whole)] == [4, 6]
    for name, parameter in weights(resumed).items():
        assert torch.equal(parameter, weights(whole)[name]), name


def test_sigterm_in_the_last_step_ends_as_usual(make_trainer):
    terminate = AtStep(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    trainer = make_trainer(**SAVING, callbacks=[terminate])
    trainer.train()
    assert not trainer.interrupted and trainer.state.global_step == 6


def test_a_disk_that_is_full_leaves_the_checkpoints_before(make_trainer, tmp_path):
    """The limit on a file's size makes the kernel refuse a write in the middle of a file, as a full disk does."""
    whole = make_trainer(**SAVING, output_dir=str(tmp_path / "whole"))
    whole.train()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = AtStep(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)))
    run = tmp_path / "full"
    cut = make_trainer(**SAVING, output_dir=str(run), callbacks=[fill])
    try:
        with pytest.raises(CheckpointError, match=r"cannot save .*checkpoint-4: .*continue from .*checkpoint-2"):
            cut.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2"]
    resumed = make_trainer(**SAVING, output_dir=str(run))
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)


def test_a_save_that_was_killed_leaves_no_checkpoint(make_trainer, tmp_path, monkeypatch):
    cut = make_trainer(**SAVING)
    run = Path(cut.args.output_dir)

    def power_cut(*args):
        assert (run / ".saving" / "checkpoint-2" / "model.safetensors").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("open_qwen2vl.trainer.checkpoints.saving.publish_folder", power_cut)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert newest_complete_checkpoint(run) is None
    monkeypatch.undo()
    again = make_trainer(**SAVING)
    again.train(resume_from_checkpoint=True)
    assert list(checkpoints_by_step(run)) == [2, 4, 6] and not (run / ".saving" / "checkpoint-2").exists()


def test_old_checkpoints_are_pruned(make_trainer):
    trainer = make_trainer(**SAVING, save_total_limit=2)
    trainer.train()
    assert list(checkpoints_by_step(trainer.args.output_dir)) == [4, 6]


def test_pruning_keeps_the_best_and_the_newest(tmp_path):
    for step in (10, 2, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
    prune(tmp_path, None, None)
    prune(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert list(checkpoints_by_step(tmp_path)) == [2, 30]
    prune(tmp_path, 1, str(tmp_path / "checkpoint-2"))
    assert list(checkpoints_by_step(tmp_path)) == [2, 30]


def test_the_best_checkpoint_is_found_where_it_is(make_trainer, packs):
    trainer = make_trainer(
        **SAVING, eval_dataset=packs, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == Path(trainer.args.output_dir) and (best / "model.safetensors").exists()
    again = make_trainer(
        **SAVING, eval_dataset=packs, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(best)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-3}, "learning_rate 0.001, now 0.002"),
        ({"max_steps": 8}, "max_steps 6, now 8"),
        ({"seed": 7, "weight_decay": 0.5}, "weight_decay 0.0, now 0.5; seed 42, now 7"),
        ({"gradient_accumulation_steps": 2}, "packs_per_step 1, now 2"),
        ({"train_vision_tower": True}, "train_vision_tower False, now True"),
    ],
)
def test_another_run_is_refused(make_trainer, change, message):
    trainer = make_trainer(**SAVING)
    trainer.train()
    other = make_trainer(**{**SAVING, **change})
    with pytest.raises(ValueError, match=f"checkpoint-6 was trained with {message}"):
        other.train(resume_from_checkpoint=True)


def test_what_changes_no_step_is_not_refused(make_trainer):
    trainer = make_trainer(**{**SAVING, "per_device_train_batch_size": 2})
    trainer.train()
    changed = {**SAVING, "save_steps": 3, "logging_steps": 1, "gradient_accumulation_steps": 2}
    make_trainer(**changed).train(resume_from_checkpoint=True)
