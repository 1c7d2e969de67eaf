import pytest
import torch

from open_qwen2vl.families.open_qwen2vl_model import OpenQwen2VLPackedModel
from open_qwen2vl.trainer.optimization import part_of, set_part_learning_rates


def rate_of(trainer, name):
    parameter = dict(trainer.model.named_parameters())[name]
    (group,) = [g for g in trainer.optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group["lr"], group["weight_decay"]


NAMES = {
    "vision_tower": "model.vision_tower.encoder.layers.0.mlp.fc1.",
    "projector": "model.multi_modal_projector.linear_1.",
    "language_model": "model.language_model.layers.0.self_attn.q_proj.",
}


def test_each_part_has_its_learning_rate_and_decay(make_trainer):
    trainer = make_trainer(
        train_vision_tower=True,
        learning_rate=1e-3,
        projector_learning_rate=5e-3,
        vision_tower_learning_rate=1e-5,
        weight_decay=0.1,
    )
    trainer.create_optimizer()
    expected = {"vision_tower": 1e-5, "projector": 5e-3, "language_model": 1e-3}
    for part, name in NAMES.items():
        assert part_of(name, OpenQwen2VLPackedModel.parts) == part
        assert rate_of(trainer, f"{name}weight") == (expected[part], 0.1)
        assert rate_of(trainer, f"{name}bias") == (expected[part], 0.0)
    grouped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(trainer.model.parameters()))


def test_all_parts_follow_the_schedule(make_trainer):
    trainer = make_trainer(
        projector_learning_rate=1e-2, learning_rate=1e-3, max_steps=4, lr_scheduler_type="linear", warmup_steps=0
    )
    seen = []
    trainer.create_optimizer_and_scheduler(4)
    for _ in range(4):
        seen.append([rate_of(trainer, f"{NAMES[part]}weight")[0] for part in ("projector", "language_model")])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    for projector, language_model in seen:
        assert projector == pytest.approx(10 * language_model)
    assert [rate for _, rate in seen] == pytest.approx([1e-3 * left / 5 for left in (4, 3, 2, 1)])


def test_a_rate_that_is_a_tensor_stays_one(make_trainer):
    """As torchao's optimizers have it: each group its own."""
    trainer = make_trainer(learning_rate=1e-3, projector_learning_rate=5e-3)
    named = list(trainer.model.named_parameters())
    optimizer = torch.optim.AdamW([p for _, p in named], lr=torch.tensor(1e-3), fused=True)
    parts = set_part_learning_rates(optimizer, named, trainer.args, OpenQwen2VLPackedModel.parts)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert dict(zip(parts, rates, strict=True))["projector"] == torch.tensor(5e-3)
    assert len({rate.data_ptr() for rate in rates}) == len(rates) == 3


def test_a_frozen_tower_is_kept_in_bf16_where_the_training_computes_in_it(make_trainer):
    frozen = make_trainer(bf16=True).model.model
    assert {p.dtype for p in frozen.vision_tower.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in frozen.language_model.parameters()} == {torch.float32}
    trained = make_trainer(bf16=True, train_vision_tower=True)
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32}


def test_training_in_bf16_goes_as_in_fp32(make_trainer):
    losses = []
    for bf16 in (False, True):
        trainer = make_trainer(bf16=bf16, max_steps=6, learning_rate=3e-3)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1] != losses[0]


def test_the_log_names_the_learning_rate_of_each_part(make_trainer):
    trainer = make_trainer(projector_learning_rate=1e-2, learning_rate=1e-3, max_steps=2, warmup_steps=0)
    trainer.train()
    for log in [log for log in trainer.state.log_history if "loss" in log]:
        assert log["learning_rate/projector"] == pytest.approx(10 * log["learning_rate/language_model"])
    assert "learning_rate/vision_tower" not in log and log["learning_rate/language_model"] > 0
