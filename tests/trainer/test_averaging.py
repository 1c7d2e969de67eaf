"""`ema_decay`: the average is what the formula says, is evaluated and saved, and the training does not notice it."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, PackedTrainer
from open_qwen2vl.trainer import save_final_model
from open_qwen2vl.trainer.checkpoints.completeness import missing_part
from open_qwen2vl.trainer.lora import add_lora
from open_qwen2vl.trainer.optimization import check_what_trains

OPTIONS = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-3, "ema_decay": 0.25}
DECAYS = (2 / 11, 0.25, 0.25, 0.25)  # of the second step and those after it: step / (step + 9), at most `ema_decay`


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})


def losses(trainer, name="loss"):
    return [log[name] for log in trainer.state.log_history if name in log]


def test_the_average_of_a_run(make_trainer, packs, tmp_path):
    """Evaluated and saved, and a resumed run has the very same; losses and weights are those of a run without it."""
    seen, run = Weights(), tmp_path / "run"
    evaluated = {**OPTIONS, "eval_dataset": packs[:3], "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(**evaluated, callbacks=[seen])
    trainer.train()
    plain = make_trainer(**{**OPTIONS, "ema_decay": None, "save_strategy": "no"})
    plain.train()
    assert losses(trainer) == losses(plain)

    expected, saved = seen.after[0], {}
    for step, (decay, weights) in enumerate(zip(DECAYS, seen.after[1:], strict=True), start=2):
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in weights}
        saved[step] = expected
    for step in (2, 4, 5):
        model = OpenQwen2VLForConditionalGeneration.from_pretrained(run / f"checkpoint-{step}" / "ema")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, saved[step][name], msg=name)
        assert missing_part(run / f"checkpoint-{step}") is None
    # Evaluated as it is saved, while the model goes on with its own weights.
    assert trainer.evaluate()["eval_loss"] == plain_loss(make_trainer, model, packs)
    for (name, parameter), average in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, seen.after[-1][name]), name
        assert torch.equal(parameter, average) != parameter.requires_grad, name
    save_final_model(trainer, run / "model")
    final, last = (load_file(folder / "model.safetensors") for folder in (run / "model", run / "checkpoint-5" / "ema"))
    assert final.keys() == last.keys() and all(torch.equal(final[name], tensor) for name, tensor in last.items())

    again = make_trainer(**evaluated)
    again.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert losses(again) == losses(trainer)
    assert losses(again, "eval_loss") == losses(trainer, "eval_loss")[:-1]
    for ours, theirs in zip(again._average._average, trainer._average._average, strict=True):
        assert torch.equal(ours, theirs)

    checkpoint = run / "checkpoint-4"
    (checkpoint / "ema" / "model.safetensors").unlink()
    assert missing_part(checkpoint) == "no whole ema/model.safetensors"
    shutil.rmtree(checkpoint / "ema")
    with pytest.raises(ValueError, match=r"checkpoint-4 has no ema/: ema_decay cannot begin in the middle of a run"):
        again.train(resume_from_checkpoint=str(checkpoint))


def plain_loss(make_trainer, model, packs) -> float:
    trainer = make_trainer(eval_dataset=packs[:3])
    trainer.model.load_state_dict(model.state_dict())
    return trainer.evaluate()["eval_loss"]


@pytest.mark.slow
def test_an_adapters_average_is_an_adapter(tiny_model, arguments, packs, processor):
    torch.manual_seed(0)
    tiny_model.save_pretrained(arguments().output_dir + "-base")
    tiny_model = OpenQwen2VLForConditionalGeneration.from_pretrained(arguments().output_dir + "-base")

    def trainer():
        torch.manual_seed(0)
        base = OpenQwen2VLForConditionalGeneration.from_pretrained(arguments().output_dir + "-base")
        args = arguments(**{**OPTIONS, "max_steps": 4})
        return PackedTrainer(add_lora(base), args, train_dataset=packs, processing_class=processor)

    whole, again = trainer(), trainer()
    whole.train()
    run = Path(whole.args.output_dir)
    again.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert losses(again) == losses(whole)
    for ours, theirs in zip(again._average._average, whole._average._average, strict=True):
        assert torch.equal(ours, theirs)
    saved = load_file(run / "checkpoint-4" / "ema" / "adapter_model.safetensors")
    assert (
        len(saved) == len(whole._average._average)
        and not (run / "checkpoint-4" / "ema" / "model.safetensors").exists()
    )
    adapted = PeftModel.from_pretrained(tiny_model, run / "checkpoint-4" / "ema", is_trainable=True)
    with whole._average.in_model(whole.model):
        for ours, theirs in zip(adapted.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_what_does_not_go_with_it_is_refused(arguments, tiny_model):
    for value, message in ((0, "above 0"), (1.0, "below 1"), (float("nan"), "above 0")):
        with pytest.raises(ValueError, match=f"ema_decay must be {message}"):
            arguments(ema_decay=value)
    with pytest.raises(ValueError, match="load_best_model_at_end is not supported with ema_decay"):
        arguments(ema_decay=0.9, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    with pytest.raises(ValueError, match=r"ema_decay needs weights in float32 \(dtype\)"):
        check_what_trains(tiny_model.to(torch.bfloat16), arguments(ema_decay=0.9))
