"""Muon for the matrices of hidden layers, 8-bit AdamW: what they move, at what rate; a run resumes exactly."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import StateDictType
from torch.optim._muon import _zeropower_via_newtonschulz
from transformers import AutoModelForImageTextToText

from open_qwen2vl.trainer.lora import add_lora
from open_qwen2vl.trainer.muon import hidden_matrices, muon_and_adamw, newton_schulz
from open_qwen2vl.trainer.optimization import check_what_trains
from open_qwen2vl.trainer.sharding import check_state
from tests.qwen_vl import FAMILIES

SLOW = pytest.param("adamw_torch_8bit", marks=pytest.mark.slow)  # compiles its step


def names_of(model, parameters) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def test_muon_has_the_matrices_of_hidden_layers(tiny_model):
    """And neither embeddings nor head, tied or not, nor patch and position embeddings."""
    matrices = names_of(tiny_model, hidden_matrices(tiny_model))
    assert "model.language_model.layers.0.mlp.down_proj.weight" in matrices
    assert "model.vision_tower.encoder.layers.0.mlp.fc1.weight" in matrices
    assert "model.multi_modal_projector.linear_2.weight" in matrices
    left = {name for name, parameter in tiny_model.named_parameters() if parameter.ndim >= 2} - matrices
    assert {name.removeprefix("model.").removesuffix(".weight") for name in left} - {"lm_head"} == {
        "language_model.embed_tokens",
        "vision_tower.embeddings.patch_embedding",
        "vision_tower.embeddings.position_embedding",
    }
    tiny_model.model.vision_tower.requires_grad_(False)
    assert not any("vision_tower" in name for name in names_of(tiny_model, hidden_matrices(tiny_model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_has_the_matrices_of_every_family(qwen_vl_folder, family):
    model = AutoModelForImageTextToText.from_pretrained(qwen_vl_folder(family))
    matrices = names_of(model, hidden_matrices(model))
    left = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2} - matrices
    known = ("patch_embed.proj", "pos_embed", "embed_tokens", "lm_head")
    assert {name for name in left if name.removesuffix(".weight").rpartition("visual.")[2].endswith(known)} == left
    assert any("merger" in name for name in matrices) and all(".norm" not in name for name in matrices)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (32, 32)])
def test_the_iteration_is_torchs(shape):
    """Bit for bit in bf16; fp32, which a CPU computes in, is as near as bf16 rounds."""
    matrix, options = torch.randn(shape), ((3.4445, -4.775, 2.0315), 5, 1e-7)
    expected = _zeropower_via_newtonschulz(matrix, *options)
    assert torch.equal(newton_schulz(matrix.bfloat16(), *options), expected)
    found = newton_schulz(matrix, *options)
    assert (found - expected).norm() < 0.03 * found.norm()


def test_a_step_is_that_of_torchs_own_optimizers(tiny_model, arguments):
    args = arguments(optim="muon", weight_decay=0.1, adam_beta2=0.95)
    other = copy.deepcopy(tiny_model)
    ours = muon_and_adamw(tiny_model, args)
    matrices = list(hidden_matrices(other))
    rest = [p for p in other.parameters() if p.ndim >= 2 and not any(p is m for m in matrices)]
    plain = [p for p in other.parameters() if p.ndim < 2]
    muon = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    before = copy.deepcopy(tiny_model.state_dict())
    for _ in range(3):
        for parameter, same in zip(tiny_model.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            same.grad = parameter.grad.clone()
        for optimizer in (ours, muon, adamw):
            optimizer.step()
    for (name, parameter), same in zip(tiny_model.named_parameters(), other.parameters(), strict=True):
        # Muon's iteration is in fp32 on a CPU, torch's in bf16.
        rounded = 0.03 if any(same is matrix for matrix in matrices) else 0
        moved = (parameter - before[name]).norm()
        assert moved > 0 and (parameter - same).norm() <= rounded * moved, name


def test_muon_moves_a_matrix_as_far_as_adamw(tiny_model, arguments):
    """So learning rates and decay of a recipe stay: root mean squares of both first steps, rate 1."""
    model = tiny_model.model.language_model
    matrix, embedding = model.layers[0].mlp.down_proj.weight, model.embed_tokens.weight
    before = [parameter.detach().clone() for parameter in (matrix, embedding)]
    for parameter in tiny_model.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon_and_adamw(tiny_model, arguments(optim="muon", learning_rate=1.0)).step()
    moved, moved_by_adamw = (
        (parameter - old).square().mean().sqrt().item()
        for parameter, old in zip((matrix, embedding), before, strict=True)
    )
    # AdamW's first step is the sign of the gradient; in training it is a fifth of that, as the paper measures.
    assert moved_by_adamw == pytest.approx(1, rel=1e-3)
    assert 0.1 < moved < 0.3


def test_muons_groups_have_the_rates_of_their_parts(make_trainer):
    rates = {"learning_rate": 1e-3, "projector_learning_rate": 5e-3}
    trainer = make_trainer(optim="muon", weight_decay=0.1, **rates)
    trainer.create_optimizer()
    groups = trainer.optimizer.param_groups
    assert {(group["lr"], group["weight_decay"], "ns_steps" in group) for group in groups} == {
        (1e-3, 0.1, True),
        (5e-3, 0.1, True),
        (1e-3, 0.1, False),
        (1e-3, 0.0, False),
        (5e-3, 0.0, False),
    }
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in trained)


@pytest.mark.parametrize("optim", ["muon", "adamw_8bit", SLOW])
def test_a_run_resumes_exactly(make_trainer, optim):
    if optim == "adamw_torch_8bit":
        pytest.importorskip("torchao")
    options = {"optim": optim, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1, "max_steps": 4}
    options |= {"projector_learning_rate": 2e-3}
    whole = make_trainer(**options)
    whole.train()
    again = make_trainer(**options)
    again.train(resume_from_checkpoint=f"{again.args.output_dir}/checkpoint-2")
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    for (name, parameter), same in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(parameter, same), name
    if optim == "adamw_8bit":
        states = whole.optimizer.state_dict()["state"].values()
        kinds = {tensor.dtype for state in states for tensor in state["__bnb_optimizer_quant_state__"].values()}
        assert torch.uint8 in kinds


def test_muon_is_refused_where_it_cannot_be_meant(tiny_model, arguments):
    with pytest.raises(ValueError, match="optim muon is for whole matrices, an adapter's are factors of one"):
        check_what_trains(add_lora(tiny_model), arguments(optim="muon"))
    with pytest.raises(ValueError, match="optim_args has no effect on this optim"):
        arguments(optim="muon", optim_args="momentum=0.9")


def test_what_knows_no_shards_is_refused_under_fsdp(tiny_model, arguments):
    sharded = SimpleNamespace(state_dict_type=StateDictType.SHARDED_STATE_DICT)
    full = SimpleNamespace(state_dict_type=StateDictType.FULL_STATE_DICT)
    check_state(sharded, tiny_model, arguments(optim="muon", async_save=True, ema_decay=0.9))
    with pytest.raises(ValueError, match="optim adamw_8bit is bitsandbytes', which takes no shards"):
        check_state(sharded, tiny_model, arguments(optim="adamw_8bit"))
    with pytest.raises(ValueError, match="async_save needs fsdp_state_dict_type: SHARDED_STATE_DICT"):
        check_state(full, tiny_model, arguments(async_save=True))
    with pytest.raises(ValueError, match="ema_decay is not supported for an adapter under FSDP2"):
        check_state(sharded, add_lora(tiny_model), arguments(ema_decay=0.9))


def test_states_that_cannot_be_copied_are_refused(arguments):
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="async_save is not supported with torchao's optimizers"):
        arguments(optim="adamw_torch_8bit", async_save=True)
