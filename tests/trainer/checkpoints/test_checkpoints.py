"""Checkpoints are complete or absent, and only the same run resumes from them."""

import copy
import os
import re
import resource
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from open_qwen2vl.families import packed_model
from open_qwen2vl.trainer import newest_complete_checkpoint
from open_qwen2vl.trainer.checkpoints import saving
from open_qwen2vl.trainer.checkpoints.completeness import missing_part
from open_qwen2vl.trainer.checkpoints.folders import CheckpointError, checkpoints_by_step, prune
from open_qwen2vl.trainer.checkpoints.run_record import check_same_run, run_record, weights_record, write_run_record
from open_qwen2vl.trainer.lora import add_lora

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
        with pytest.raises(CheckpointError, match=r"cannot save .*checkpoint-4: .*resumes from .*checkpoint-2"):
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where the checkpoints of one finished run are kept for the tests below."""
    return tmp_path_factory.mktemp("whole") / "run"


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("trainer_state.json", cut_in_half),
        ("model.safetensors", Path.unlink),
        ("model.safetensors", cut_in_half),
        ("optimizer.pt", Path.unlink),
        ("optimizer.pt", cut_in_half),
        ("scheduler.pt", Path.unlink),
        ("rng_state.pth", Path.unlink),
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_passed_over_or_refused(make_trainer, whole, tmp_path, caplog, file, damage):
    if not whole.exists():
        make_trainer(**SAVING, output_dir=str(whole)).train()
    run = tmp_path / "run"
    for step in (4, 6):
        shutil.copytree(whole / f"checkpoint-{step}", run / f"checkpoint-{step}")
    damage(run / "checkpoint-6" / file)
    assert newest_complete_checkpoint(run) == str(run / "checkpoint-4")
    (message,) = [text for text in caplog.messages if "is incomplete" in text]
    assert f"checkpoint-6 is incomplete (no whole {file}" in message
    with pytest.raises(ValueError, match=f"checkpoint-6 is no checkpoint to resume from: no whole {file}"):
        make_trainer(**SAVING).train(resume_from_checkpoint=str(run / "checkpoint-6"))


def test_weights_of_another_model_are_an_error(make_trainer, whole, tmp_path):
    if not whole.exists():
        make_trainer(**SAVING, output_dir=str(whole)).train()
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(whole / "checkpoint-6", checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    first = next(iter(weights))
    weights[f"visual.{first}"] = weights.pop(first)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 missing \({re.escape(first)}\) and 1 unknown \(visual\."):
        make_trainer(**SAVING).train(resume_from_checkpoint=str(checkpoint))


def test_other_weights_are_another_run(tiny_model, backbones, make_trainer, tmp_path):
    """The type of the weights, their quantisation and an adapter's base model, each by name."""
    parts = packed_model(tiny_model.config).parts
    args = make_trainer().args
    base = run_record(args, None, weights_record(tiny_model, parts))
    half = run_record(args, None, weights_record(copy.deepcopy(tiny_model).to(torch.bfloat16), parts))
    quantised = copy.deepcopy(tiny_model)
    quantised.config.quantization_config = {"load_in_4bit": True}
    quantised = run_record(args, None, weights_record(quantised, parts))
    other_base = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other_base.model.language_model.norm.weight[0] += 0.5
    adapters = [run_record(args, None, weights_record(add_lora(model), parts)) for model in (tiny_model, other_base)]
    for saved, now, message in [
        (base, half, "dtype.language_model float32, now bfloat16; dtype.projector float32, now bfloat16"),
        (base, quantised, "quantization None, now {'load_in_4bit': True}"),
        (base, adapters[0], "adapter None, now"),
        (*adapters, "adapter.base_model_weights [0-9a-f]{16}, now [0-9a-f]{16}[.]"),
    ]:
        write_run_record(tmp_path, saved)
        check_same_run(tmp_path, saved)
        with pytest.raises(ValueError, match=f"was trained with {message}"):
            check_same_run(tmp_path, now)


def test_sigterm_within_a_save_waits_for_it(make_trainer, tmp_path, monkeypatch):
    publish = saving.publish_folder

    def terminated(staged, final):
        if final.name == "checkpoint-2":
            os.kill(os.getpid(), signal.SIGTERM)
        publish(staged, final)

    monkeypatch.setattr(saving, "publish_folder", terminated)
    trainer = make_trainer(**SAVING)
    trainer.train()
    assert trainer.interrupted and list(checkpoints_by_step(trainer.args.output_dir)) == [2, 3]
    assert all(missing_part(folder) is None for folder in checkpoints_by_step(trainer.args.output_dir).values())


def test_what_changes_no_step_is_not_refused(make_trainer):
    trainer = make_trainer(**{**SAVING, "per_device_train_batch_size": 2})
    trainer.train()
    changed = {**SAVING, "save_steps": 3, "logging_steps": 1, "gradient_accumulation_steps": 2}
    make_trainer(**changed).train(resume_from_checkpoint=True)


def pickled_call(path):
    class Call:
        def __reduce__(self):
            return os.mkdir, (str(path) + ".called",)

    torch.save({"state": Call()}, path)


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")


def unknown_type(path):
    header = path.read_bytes()
    path.write_bytes(header.replace(b'"F32"', b'"X32"', 1))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("optimizer.pt", other_zip, "no whole optimizer.pt"),
        ("optimizer.pt", pickled_call, "optimizer.pt is none"),
        ("scheduler.pt", pickled_call, "scheduler.pt is none"),
        ("model.safetensors", unknown_type, "model.safetensors is none"),
        ("model.safetensors", lambda path: path.write_bytes(b"\xff" * 64), "no whole model.safetensors"),
    ],
)
def test_files_that_are_no_such_thing_are_named(make_trainer, tmp_path, name, damage, message):
    options = {**SAVING, "max_steps": 2}
    make_trainer(**options).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    damage(checkpoint / name)
    with pytest.raises(ValueError, match=message):
        make_trainer(**options).train(resume_from_checkpoint=str(checkpoint))
    assert not (checkpoint / f"{name}.called").exists()
