"""`async_save`: training goes on while a checkpoint is written, which is whole or absent as ever.

What happens when is shown by events: the writer is held by a lock that a later step opens.
"""

import copy
import resource
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from open_qwen2vl import PackedTrainer
from open_qwen2vl.trainer import newest_complete_checkpoint
from open_qwen2vl.trainer.checkpoints import saving
from open_qwen2vl.trainer.checkpoints.folders import CheckpointError, checkpoints_by_step
from open_qwen2vl.trainer.lora import add_lora
from tests.trainer.checkpoints.test_checkpoints import AtStep, losses, weights

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "logging_steps": 1, "async_save": True}
PATIENCE = 120  # seconds until a held thread is an error


class Events(TrainerCallback):
    """Notes what happens, and lets the writer go on after a step."""

    def __init__(self, monkeypatch, opens_after):
        self.seen, self.opens_after, self.open = [], opens_after, threading.Event()
        publish = saving.publish_folder

        def held(staged, final):
            assert threading.current_thread() is not threading.main_thread()
            assert self.open.wait(PATIENCE)
            publish(staged, final)
            self.seen.append(f"{final.name} is whole")

        monkeypatch.setattr(saving, "publish_folder", held)

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(f"step {state.global_step}")
        if state.global_step == self.opens_after:
            self.open.set()

    def on_save(self, args, state, control, **kwargs):
        self.seen.append(f"saved at {state.global_step}")


def state_of(checkpoint: Path) -> dict:
    """All tensors of a checkpoint by their place in it."""
    optimizer = torch.load(checkpoint / "optimizer.pt")["state"]
    found = {f"{number}.{name}": tensor for number, state in optimizer.items() for name, tensor in state.items()}
    for folder in ("", "ema/"):
        weights = load_file(checkpoint / f"{folder}model.safetensors")
        found |= {f"{folder}{name}": tensor for name, tensor in weights.items()}
    return found


def test_training_goes_on_while_a_checkpoint_is_written(make_trainer, monkeypatch, tmp_path):
    """A step ends with the writer held; the next save, and the end of the training, wait for it."""
    options = {**SAVING, "optim": "muon", "ema_decay": 0.9}
    plain = make_trainer(**{**options, "async_save": False}, output_dir=str(tmp_path / "plain"))
    plain.train()
    events = Events(monkeypatch, opens_after=3)
    trainer = make_trainer(**options, callbacks=[events])
    trainer.train()
    seen = events.seen
    assert seen.index("saved at 2") < seen.index("step 3") < seen.index("checkpoint-2 is whole")
    assert seen.index("checkpoint-2 is whole") < seen.index("saved at 4")
    assert "checkpoint-6 is whole" in seen
    run = Path(trainer.args.output_dir)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]

    # The same files with the same state, though the model had moved on when they were written: so it resumes exactly.
    assert losses(trainer) == losses(plain)
    for step in (2, 6):
        ours, theirs = (folder / f"checkpoint-{step}" for folder in (run, tmp_path / "plain"))
        assert {path.relative_to(ours) for path in ours.rglob("*")} == {
            p.relative_to(theirs) for p in theirs.rglob("*")
        }
        expected = state_of(theirs)
        for name, tensor in state_of(ours).items():
            assert torch.equal(tensor, expected.pop(name)), name
        assert not expected


def test_the_best_checkpoint_is_waited_for(make_trainer, packs):
    options = {**SAVING, "eval_dataset": packs, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(**options, load_best_model_at_end=True, save_total_limit=1)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == Path(trainer.args.output_dir)
    saved = load_file(best / "model.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in weights(trainer).items() if name in saved)


def test_a_full_disk_is_an_error_at_the_next_save(make_trainer, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        cut._staging.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    run = tmp_path / "full"
    cut = make_trainer(**SAVING, output_dir=str(run), callbacks=[AtStep(3, fill)])
    try:
        with pytest.raises(CheckpointError, match=r"cannot save .*checkpoint-4: .*resumes from .*checkpoint-2"):
            cut.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # Training went on until somebody asked for the next one.
    assert 4 <= cut.state.global_step <= 6
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2"]


def test_the_last_save_that_fails_is_an_error(make_trainer, monkeypatch):
    def no_room(staged, final):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "publish_folder", no_room)
    trainer = make_trainer(**{**SAVING, "max_steps": 2})
    with pytest.raises(CheckpointError, match="No space left on device; there is no checkpoint yet"):
        trainer.train()


def test_a_write_that_was_killed_leaves_the_checkpoint_before(make_trainer, monkeypatch):
    run = Path(make_trainer(**SAVING).args.output_dir)
    publish, steps = saving.publish_folder, []

    def power_cut(staged, final):
        if final.name != "checkpoint-2":
            assert (run / ".saving" / final.name / "model.safetensors").exists()
            raise KeyboardInterrupt
        publish(staged, final)

    monkeypatch.setattr(saving, "publish_folder", power_cut)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(**SAVING, callbacks=[AtStep(5, lambda: steps.append(5))]).train()
    assert newest_complete_checkpoint(run) == str(run / "checkpoint-2") and (run / ".saving" / "checkpoint-4").exists()
    monkeypatch.undo()
    make_trainer(**SAVING).train(resume_from_checkpoint=True)
    assert list(checkpoints_by_step(run)) == [2, 4, 6] and not (run / ".saving").exists()


def test_an_error_of_the_training_waits_for_the_writer(make_trainer, monkeypatch):
    """And is the one that is raised."""
    events = Events(monkeypatch, opens_after=None)

    def fail():
        threading.Timer(0.2, events.open.set).start()
        raise RuntimeError("of the training")

    trainer = make_trainer(**SAVING, callbacks=[events, AtStep(3, fail)])
    with pytest.raises(RuntimeError, match="of the training"):
        trainer.train()
    assert events.seen[-1] == "checkpoint-2 is whole"


@pytest.mark.slow
def test_an_adapter_is_saved_alone(tiny_model, arguments, packs, processor):
    folders = []
    for asynchronous in (True, False):
        torch.manual_seed(0)
        folder = f"{arguments().output_dir}-{asynchronous}"
        args = arguments(**{**SAVING, "max_steps": 2, "async_save": asynchronous, "output_dir": folder})
        model = add_lora(copy.deepcopy(tiny_model))
        PackedTrainer(model, args, train_dataset=packs, processing_class=processor).train()
        folders.append(Path(folder) / "checkpoint-2")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {path.name for path in folders[0].iterdir()} == {path.name for path in folders[1].iterdir()}
