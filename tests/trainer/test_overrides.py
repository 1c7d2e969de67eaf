"""What we override of the stock trainers, private methods too, is there in the installed versions as we know it."""

import inspect

import pytest
from transformers import Trainer
from trl import SFTTrainer

from open_qwen2vl import PackedSFTTrainer, PackedTrainer
from open_qwen2vl.trainer.packed_training import PackedTraining

# Parameters as of the versions that we have read; a star before a name means any number of them.
STOCK = {
    "_get_train_sampler": "train_dataset=None",
    "_get_eval_sampler": "eval_dataset",
    "_run_epoch": "model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
    "get_batch_samples": "epoch_iterator, num_batches, device",
    "get_decay_parameter_names": "model",
    "create_optimizer": "model=None",
    "create_scheduler": "num_training_steps, optimizer=None",
    "_get_learning_rate": "",
    "training_step": "model, inputs, num_items_in_batch=None",
    "compute_loss": "model, inputs, return_outputs=False, num_items_in_batch=None",
    "_get_grad_norm": "model, grad_norm=None",
    "floating_point_ops": "inputs",
    "log": "logs, start_time=None",
    "_maybe_log_save_evaluate": "tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, "
    "learning_rate=None",
    "evaluate": "eval_dataset=None, ignore_keys=None, metric_key_prefix='eval'",
    "prediction_step": "model, inputs, prediction_loss_only, ignore_keys=None",
    "evaluation_loop": "dataloader, description, prediction_loss_only=None, ignore_keys=None, "
    "metric_key_prefix='eval'",
    "create_model_card": "language=None, license=None, tags=None, model_name=None, finetuned_from=None, tasks=None, "
    "dataset_tags=None, dataset=None, dataset_args=None",
    "train": "resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None",
    "_finalize_training": "trial, num_train_samples, start_time",
    "_load_from_checkpoint": "resume_from_checkpoint, model=None",
    "_issue_warnings_after_load": "load_result",
    "_get_output_dir": "trial",
    "_save_checkpoint": "model, trial",
    "_push_from_checkpoint": "checkpoint_folder",
    "push_to_hub": "commit_message='End of training', blocking=True, token=None, revision=None, private=None, "
    "**kwargs",
    "save_model": "output_dir=None, _internal_call=False",
    "_save": "output_dir=None, state_dict=None",
    "_save_optimizer_and_scheduler": "output_dir",
}
SFT = {
    "create_model_card": "model_name=None, dataset_name=None, tags=None",
    "training_step": "*args, **kwargs",
    "compute_loss": "model, inputs, return_outputs=False, num_items_in_batch=None",
    "log": "logs, start_time=None",
    "evaluate": "eval_dataset=None, ignore_keys=None, metric_key_prefix='eval'",
    "prediction_step": "model, inputs, prediction_loss_only, ignore_keys=None",
    "_save_checkpoint": "model, trial",
}
OWN = {"__init__", "_add_own_callbacks", "_callback", "_end_step", "_account", "_readable"}
OWN |= {"evaluate_tasks", "summary", "run_record", "checkpoint_to_resume"}


def parameters(method) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(
        stars.get(p.kind, "") + p.name + ("" if p.default is p.empty else f"={p.default!r}")
        for p in list(inspect.signature(method).parameters.values())[1:]
    )


@pytest.mark.parametrize("name", STOCK)
def test_the_stock_method_is_as_we_know_it(name):
    for trainer, expected in ((Trainer, STOCK[name]), (SFTTrainer, SFT.get(name, STOCK[name]))):
        assert hasattr(trainer, name), f"{trainer.__name__}.{name} is gone: PackedTraining overrides it in vain"
        found = parameters(getattr(trainer, name))
        assert found == expected, f"{trainer.__name__}.{name} takes ({found}) now: look at PackedTraining.{name}"


def test_every_method_is_an_override_that_is_known_or_our_own():
    methods = {name for name, value in vars(PackedTraining).items() if inspect.isfunction(value)}
    assert methods == STOCK.keys() | OWN
    assert not [name for name in OWN - {"__init__"} if hasattr(SFTTrainer, name)], "now the stock's as well"


def test_nothing_is_overridden_elsewhere():
    for trainer in (PackedTrainer, PackedSFTTrainer):
        for ours in trainer.__mro__[: trainer.__mro__.index(Trainer)]:
            if ours.__module__.startswith("open_qwen2vl") and ours is not PackedTraining:
                methods = {name for name, value in vars(ours).items() if inspect.isfunction(value)}
                assert not methods - {"__init__", "_readable"}, ours


def test_overrides_are_short():
    for name in STOCK:
        lines, _ = inspect.getsourcelines(vars(PackedTraining)[name])
        assert len(lines) <= 30, name
