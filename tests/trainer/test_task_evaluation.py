"""Benchmarks during training: on schedule, in the logs and results, and without a trace in the training."""

import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import TrainerCallback

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, PackedSFTConfig, PackedSFTTrainer
from open_qwen2vl.evaluation.evaluate import evaluate_loaded
from open_qwen2vl.trainer.lora import lora_config
from tests.evaluation.easyvqa import write_tasks

METRIC = "eval_easyvqa_gen_exact_match"


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory) -> Path:
    """easy-VQA, also as a task that can be found and fails."""
    folder = write_tasks(tmp_path_factory.mktemp("eval_tasks") / "tasks", 4)
    broken = yaml.safe_load((folder / "easyvqa_gen.yaml").read_text()) | {"task": "broken", "doc_to_visual": "picture"}
    (folder / "broken.yaml").write_text(yaml.safe_dump(broken))
    return folder


def scores(trainer) -> dict[int, float]:
    return {log["step"]: log[METRIC] for log in trainer.state.log_history if METRIC in log}


def losses(trainer) -> list[tuple[float, float]]:
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]


def responses(folder: Path) -> list[str]:
    return pq.read_table(folder / "samples" / "easyvqa_gen.parquet")["response"].to_pylist()


def assert_same_training(trainer, plain) -> None:
    assert losses(trainer) == losses(plain) and len(losses(plain)) >= 3
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name)), name


def test_training_does_not_notice(make_trainer, processor, tasks_folder, tmp_path):
    options = {"max_steps": 3, "learning_rate": 1e-2}
    plain = make_trainer(**options)
    plain.train()
    assert "eval_tasks" not in plain.summary()
    tasks = {"eval_tasks_path": str(tasks_folder), "trust_task_code": True}
    trainer = make_trainer(**options, eval_tasks="easyvqa_gen", eval_tasks_steps=2, **tasks)
    trainer.train()
    assert_same_training(trainer, plain)
    assert list(scores(trainer)) == [2, 3], "every two steps, and at the end"
    folder = tmp_path / "run" / "eval_tasks"
    for step, score in scores(trainer).items():
        results = json.loads((folder / f"step-{step}" / "results.json").read_text())
        assert results["model"]["name"] == f"step-{step}"
        assert results["tasks"]["easyvqa_gen"]["metrics"]["exact_match"]["value"] == score
    assert trainer.summary()["eval_tasks"] == {METRIC: scores(trainer)[3]}
    # The weights of the step answered: those of the last are still here. That two steps answer differently is likely,
    # and no more: it is a matter of one machine's rounding.
    evaluate_loaded(trainer.model, processor, ["easyvqa_gen"], tmp_path / "again", include_path=[tasks_folder])
    assert responses(tmp_path / "again") == responses(folder / "step-3")


def test_the_schedule_of_evaluation_and_a_task_that_fails(make_trainer, tasks_folder, packs, caplog):
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_tasks": "broken, easyvqa_gen", "eval_tasks_limit": 2}
    options |= {
        "eval_tasks_shots": 0,
        "eval_tasks_path": str(tasks_folder),
        "trust_task_code": True,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    trainer = make_trainer(eval_dataset=packs[:2], **options)
    with caplog.at_level(logging.WARNING, "open_qwen2vl.trainer.task_evaluation"):
        trainer.train()
    assert [message.split(":")[0] for message in caplog.messages if "broken" in message] == ["step 2", "step 4"]
    name = "eval_easyvqa_gen_0shot_exact_match"
    assert [log["step"] for log in trainer.state.log_history if name in log] == [2, 4]
    assert [log["step"] for log in trainer.state.log_history if "eval_loss" in log] == [2, 4]
    saved = json.loads((Path(trainer.args.output_dir) / "checkpoint-4" / "trainer_state.json").read_text())
    assert [log["step"] for log in saved["log_history"] if name in log] == [2, 4], "saved with the checkpoint"


class DropoutMode(TrainerCallback):
    """Whether the model is in training mode at each step."""

    def __init__(self):
        self.training = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.training.append(model.training)


def test_an_adapter_answers_too(backbones, processor, packs, tasks_folder, tmp_path):
    """LoRA with dropout under autocast, so that mode, random numbers and types all matter."""

    def train(name: str, **options) -> PackedSFTTrainer:
        torch.manual_seed(0)
        model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, image_seq_length=4)
        args = PackedSFTConfig(
            output_dir=str(tmp_path / name),
            use_cpu=True,
            bf16=True,
            disable_tqdm=True,
            report_to="none",
            dataloader_num_workers=0,
            save_strategy="no",
            logging_steps=1,
            max_steps=3,
            learning_rate=0.1,  # so large a step that answers change on any machine
            **options,
        )
        adapter = lora_config(r=4, alpha=8, dropout=0.5)
        mode = DropoutMode()
        trainer = PackedSFTTrainer(model, args, packs, None, processor, adapter, callbacks=[mode])
        trainer.train()
        assert mode.training == [True] * 3
        return trainer

    plain = train("plain")
    tasks = {
        "eval_tasks": "easyvqa_gen",
        "eval_tasks_steps": 1,
        "eval_tasks_path": str(tasks_folder),
        "trust_task_code": True,
    }
    trainer = train("tasks", **tasks)
    assert_same_training(trainer, plain)
    assert list(scores(trainer)) == [1, 2, 3]
    folder = tmp_path / "tasks" / "eval_tasks"
    with trainer.accelerator.autocast():
        again = evaluate_loaded(
            trainer.model.get_base_model(),
            processor,
            ["easyvqa_gen"],
            tmp_path / "again",
            include_path=[tasks_folder],
            batch_size=8,
            max_new_tokens=128,
        )
    assert responses(tmp_path / "again") == responses(folder / "step-3") and again["tasks"]


def test_what_cannot_run_is_told_before_training(make_trainer, tasks_folder):
    with pytest.raises(ValueError, match="eval_tasks_steps must be at least 1, got 0"):
        make_trainer(eval_tasks="easyvqa_gen", eval_tasks_steps=0)
    with pytest.raises(ValueError, match="--include-path nowhere: no such folder"):
        make_trainer(eval_tasks="easyvqa_gen", eval_tasks_path="nowhere", trust_task_code=True)
    with pytest.raises(ValueError, match="eval_tasks_path .* may run any code; trust_task_code allows it"):
        make_trainer(eval_tasks="easyvqa_gen", eval_tasks_path=str(tasks_folder))
    with pytest.raises(ValueError, match="eval_tasks_limit must be at least 1"):
        make_trainer(eval_tasks="easyvqa_gen", eval_tasks_limit=0)
