"""Preference tuning with TRL's own trainers, which know nothing of this package."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from open_qwen2vl import OpenQwen2VLForConditionalGeneration
from open_qwen2vl.trainer.lora import lora_config

QUIET = {
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "activation_checkpointing": True,
}


@pytest.fixture
def model(tiny_model, tmp_path):
    """A model that was loaded from a folder: DPO's reference is loaded from there once more."""
    tiny_model.save_pretrained(tmp_path / "base")
    model = OpenQwen2VLForConditionalGeneration.from_pretrained(tmp_path / "base")
    model.model.vision_tower.requires_grad_(False)
    return model


def rows(numbers_of_images: tuple[int, ...], **columns) -> Dataset:
    """Eight prompts with so many images, in turn."""
    picture = Image.linear_gradient("L").convert("RGB").resize((20, 30))
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "\nwhat is shown in the image?"}],
                "images": [picture] * numbers_of_images[number % len(numbers_of_images)],
                **columns,
            }
            for number in range(8)
        ]
    )


def trained_parts(trainer, before: dict[str, torch.Tensor]) -> set[str]:
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    return {part for part in ("vision_tower", "multi_modal_projector", "language_model") for n in changed if part in n}


def copies(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("adapter", [None, {"r": 4, "alpha": 8}], ids=["full", "lora"])
def test_dpo_comes_to_prefer_the_chosen_answer(model, processor, tmp_path, adapter):
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(str(tmp_path / "run"), max_steps=8, **QUIET),
        train_dataset=rows((0, 1, 2), chosen=answer("a cat on a mat"), rejected=answer("blue dogs in the park")),
        processing_class=processor,
        peft_config=adapter and lora_config(**adapter),
    )
    before = copies(trainer.model)
    trainer.train()
    margins = [log["rewards/margins"] for log in trainer.state.log_history if "rewards/margins" in log]
    # Some processors round a pass with gradients otherwise than one without.
    assert abs(margins[0]) < 1e-5 and margins[-1] > 0.1, "the policy starts as its reference, and leaves it"
    assert trained_parts(trainer, before) == {"multi_modal_projector", "language_model"}


@pytest.mark.parametrize(
    ("trainer_class", "config", "adapter"),
    [
        (GRPOTrainer, GRPOConfig, None),
        (GRPOTrainer, GRPOConfig, {"r": 4, "alpha": 8}),
        (RLOOTrainer, RLOOConfig, {"r": 4, "alpha": 8}),
    ],
    ids=["grpo full", "grpo lora", "rloo lora"],
)
def test_online_trainers_take_images(model, processor, tmp_path, trainer_class, config, adapter):
    """With a reference model, whose log-probabilities are another pass through the processor's output."""
    seen = []

    def reward(completions, **kwargs):
        seen.extend(completion[0]["content"] for completion in completions)
        return [float(len(set(completion[0]["content"]))) for completion in completions]

    sampling = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
    trainer = trainer_class(
        model=model,
        args=config(str(tmp_path / "run"), max_steps=3, **sampling, **QUIET),
        reward_funcs=reward,
        train_dataset=rows((1, 2)),  # they cannot have prompts with and without images in one batch
        processing_class=processor,
        peft_config=adapter and lora_config(**adapter),
    )
    before = copies(trainer.model)
    trainer.train()
    assert len(seen) == 3 * 8 and len(set(seen)) > 4
    assert all(log["grad_norm"] > 0 for log in trainer.state.log_history if "grad_norm" in log)
    assert trained_parts(trainer, before) == {"multi_modal_projector", "language_model"}
