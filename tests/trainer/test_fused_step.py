"""Each option of the fused step computes what the plain step does, leaves checkpoints as they are, and resumes."""

import copy
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import Trainer

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, PackedTrainer, PackingCollator, prepare_for_packing
from open_qwen2vl.families import packed_model
from open_qwen2vl.families.qwen_vl.processing import QwenVLDocuments
from open_qwen2vl.trainer import fused_step
from open_qwen2vl.trainer.lora import add_lora
from open_qwen2vl.trainer.options import check_fused_step
from tests.families.qwen_vl.packs import mixed_documents, pack
from tests.qwen_vl import FAMILIES, make_model, make_processor, make_tokenizer

COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
OPTIONS = {
    "compiled, in bf16": COMPILED | {"bf16": True, "bf16_residual": True},
    "compiled, recomputed": COMPILED | {"activation_checkpointing": True, "train_vision_tower": True},
    "float8": COMPILED | {"bf16": True, "bf16_residual": True, "float8": True},
    "float8 beneath LoRA": COMPILED | {"bf16": True, "float8": True},
}


@pytest.fixture
def model(tiny_model):
    """In fp32; its MLP is wide enough for float8."""
    config = copy.deepcopy(tiny_model.config)
    config.text_config.intermediate_size = 1040
    torch.manual_seed(0)
    return OpenQwen2VLForConditionalGeneration._from_config(config, attn_implementation="packed_varlen").train()


def batch_of(packs) -> dict:
    batch = PackingCollator()(packs)
    batch.pop("packing_stats")
    return batch


def loss_and_gradients(model, batch, **autocast):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, **autocast):
        loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: dict, expected: dict) -> float:
    """Between all gradients together, as a part of their norm: that of a key's bias is 0 but for rounding."""
    difference = torch.cat([(found[name] - gradient).flatten() for name, gradient in expected.items()])
    return (difference.norm() / torch.cat([gradient.flatten() for gradient in expected.values()]).norm()).item()


def test_a_bf16_residual_is_as_close_as_autocast(model, packs):
    """The bounds of docs/performance.md; what is in bf16 is the stream of the language model, and no norm or table."""
    batch, seen = batch_of(packs[:2]), {}
    exact, exact_gradients = loss_and_gradients(model, batch, enabled=False)
    mixed, mixed_gradients = loss_and_gradients(model, batch)
    fused_step.prepare_fused_step(model, chosen(bf16=True, bf16_residual=True), packed_model(model.config))
    assert loss_and_gradients(model, batch, enabled=False)[0] == exact
    for name, module in model.model.language_model.named_modules():
        if type(module).__name__ == "Qwen2DecoderLayer":
            module.register_forward_hook(
                lambda _, args, kwargs, output, name=name: seen.update(
                    {name: (args[0].dtype, output.dtype, kwargs["position_embeddings"][0].dtype)}
                ),
                with_kwargs=True,
            )
            module.input_layernorm.register_forward_hook(
                lambda *call, name=name: seen.update({f"{name}.norm": (call[2].dtype,)})
            )
    found, gradients = loss_and_gradients(model, batch)
    assert seen["layers.0"] == seen["layers.1"] == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert seen["layers.0.norm"] == seen["layers.1.norm"] == (torch.float32,)
    assert found != mixed
    assert found == pytest.approx(exact, rel=4e-3) and mixed == pytest.approx(exact, rel=4e-3)
    assert distance(gradients, exact_gradients) < 2 * distance(mixed_gradients, exact_gradients) < 0.2


def test_float8_changes_the_large_products_and_little_else(model, packs):
    """Emulated: the very numbers of a GPU's scaled products, in fp32 sums."""
    pytest.importorskip("torchao", reason="needs the package torchao")
    batch = batch_of(packs[:2])
    exact, exact_gradients = loss_and_gradients(model, batch, enabled=False)
    names, state = list(exact_gradients), {name: (w.dtype, w.shape) for name, w in model.state_dict().items()}
    fused_step._use_float8(model, packed_model(model.config), emulate=True)
    changed = [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
    assert changed == [
        f"model.language_model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up")
    ]
    assert {name: (w.dtype, w.shape) for name, w in model.state_dict().items()} == state
    loss, gradients = loss_and_gradients(model, batch, enabled=False)
    assert loss != exact and loss == pytest.approx(exact, rel=2e-2)
    assert list(gradients) == names and 0 < distance(gradients, exact_gradients) < 0.25


def test_float8_needs_layers_of_some_size(tiny_model):
    pytest.importorskip("torchao", reason="needs the package torchao")
    with pytest.raises(ValueError, match="float8: the language model has no linear layer that is large enough"):
        fused_step._use_float8(tiny_model, packed_model(tiny_model.config), emulate=True)


@pytest.mark.slow
def test_liger_computes_the_same(tmp_path):
    """By Triton's interpreter, which has to be on before Triton is imported; on a GPU by the GPU."""
    pytest.importorskip("liger_kernel", reason="needs the package liger-kernel")
    make_tokenizer(tmp_path / "tokenizer")
    interpreter = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("liger_step.py"), tmp_path],
        env={**os.environ, **interpreter, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("equal") == len(FAMILIES) + 2


def test_liger_takes_modules_one_by_one(tiny_model, qwen_vl_tokenizer):
    """Each of the language model's is still of its stock class, others of these classes stay as they are."""
    pytest.importorskip("liger_kernel", reason="needs the package liger-kernel")
    for model in (tiny_model, *(make_model(family, qwen_vl_tokenizer) for family in FAMILIES)):
        classes = packed_model(model.config).fused_classes
        stock = {module: type(module) for module in model.modules() if type(module).__name__ in classes}
        forwards = {kind: kind.forward for kind in stock.values()}
        fused_step._use_liger(model, classes)
        assert {classes[kind.__name__] for kind in stock.values()} == {"rms_norm", "swiglu", "rope"}
        assert all(type(module) is not kind and isinstance(module, kind) for module, kind in stock.items())
        assert all(kind.forward is forward for kind, forward in forwards.items())
        text = model.model.language_model
        fused = sum(type(module).__bases__[0] in forwards for module in text.modules())
        assert fused == len(text.layers) * (6 if model.config.model_type == "qwen3_vl" else 4) + 1


def test_trainers_own_call_of_liger_changes_nothing(make_trainer, monkeypatch):
    """It would replace the packed forward and its loss."""
    calls = []
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", lambda *call: calls.append(call))
    trainer = make_trainer(max_steps=1)
    trainer.args.use_liger_kernel = True
    trainer.train()
    assert not calls
    Trainer.train(trainer)
    assert calls


def test_a_family_without_such_modules_is_refused(tiny_model):
    tiny_model.model.language_model.layers[1].mlp.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match="use_liger_kernel: the model's MLPs have GELU.*, and Liger's SiLU"):
        fused_step._use_liger(tiny_model, packed_model(tiny_model.config).fused_classes)
    with pytest.raises(ValueError, match="use_liger_kernel: OpenQwen2VLForConditionalGeneration has nothing that"):
        fused_step._use_liger(tiny_model, {})


def chosen(device: str = "cuda", **options) -> SimpleNamespace:
    """As much of a training's arguments as is looked at."""
    names = ("use_liger_kernel", "torch_compile", "bf16", "bf16_residual", "float8")
    options = {
        "torch_compile_mode": None,
        "torch_compile_backend": "inductor",
        **dict.fromkeys(names, False),
        **options,
    }
    return SimpleNamespace(**options, device=torch.device(device))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            chosen(use_liger_kernel=True, torch_compile=True),
            "use_liger_kernel and torch_compile fuse the same operations",
        ),
        (chosen("cpu", use_liger_kernel=True), "use_liger_kernel needs a GPU"),
        (chosen(bf16_residual=True), "bf16_residual needs bf16"),
        (chosen(torch_compile=True, torch_compile_mode="reduce-overhead"), "mode reduce-overhead is neither default"),
        (chosen(float8=True, bf16=True), "float8 needs torch_compile"),
        (
            chosen(float8=True, torch_compile=True),
            r"float8 units \(sm_89 or later\), this is NVIDIA A100",
        ),
    ],
)
def test_what_does_not_go_is_refused(monkeypatch, given, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=message):
        check_fused_step(given)


@pytest.mark.parametrize(("option", "package"), [("use_liger_kernel", "liger-kernel"), ("float8", "torchao")])
def test_a_missing_package_is_named(arguments, monkeypatch, option, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in ("liger_kernel", "torchao") else find(name)
    )
    with pytest.raises(ValueError, match=f"{option} needs the package {package} .pip install {package}."):
        arguments(**{option: True})


def test_a_compiler_of_accelerates_config_is_refused(make_trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(
        ValueError, match="accelerate's config asks for a compiler .dynamo_config.: give torch_compile"
    ):
        make_trainer()


def test_only_training_is_compiled(tiny_model, packs, fresh_compiler):
    batch = batch_of(packs[:1])
    fused_step.compile_blocks(tiny_model, packed_model(tiny_model.config), "eager", None)
    with torch.no_grad():
        tiny_model.eval()(**batch)
    tiny_model.generate(input_ids=torch.tensor([[4, 10, 11]]), max_new_tokens=2)
    assert not counters["stats"]["unique_graphs"]
    tiny_model.train()(**batch)
    assert counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa", "packed_varlen"])
@pytest.mark.parametrize("family", ["open_qwen2vl", *FAMILIES])
def test_compiled_blocks_under_every_attention(
    family, attention, tiny_model, packs, qwen_vl_tokenizer, fresh_compiler
):
    """On a CPU; the kernel of a GPU is that of tests/modeling/test_varlen.py."""
    if family == "open_qwen2vl":
        model, batches = tiny_model.train(), [batch_of([packs[i]]) for i in (1, 3, 4, 6)]
    else:
        processor = make_processor(family, qwen_vl_tokenizer)
        model = prepare_for_packing(make_model(family, qwen_vl_tokenizer), processor).train()
        documents = mixed_documents(QwenVLDocuments(processor))
        batches = [pack([documents[i:j]]) for i, j in ((0, 6), (4, 9), (2, 7), (0, 3))]
    model.model.language_model.set_attn_implementation(attention)
    expected = [loss_and_gradients(model, batch, enabled=False) for batch in batches]
    fused_step.compile_blocks(model, packed_model(model.config), "aot_eager", None)
    for number, (batch, (loss, gradients)) in enumerate(zip(batches, expected, strict=True)):
        with torch.compiler.set_stance("fail_on_recompile" if number >= 2 else "default"):
            found, found_gradients = loss_and_gradients(model, batch, enabled=False)
        assert found == pytest.approx(loss, rel=1e-5) and distance(found_gradients, gradients) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_computes_the_same(tiny_model, packs, fresh_compiler):
    batch = batch_of(packs[:1])
    loss, expected = loss_and_gradients(tiny_model.train(), batch, enabled=False)
    fused_step.compile_blocks(tiny_model, packed_model(tiny_model.config), "inductor", None)
    found, gradients = loss_and_gradients(tiny_model, batch, enabled=False)
    assert found == pytest.approx(loss, rel=1e-5) and distance(gradients, expected) < 1e-4


@pytest.mark.parametrize(
    "name", [next(iter(OPTIONS)), *(pytest.param(name, marks=pytest.mark.slow) for name in list(OPTIONS)[1:])]
)
def test_a_resumed_run_has_the_same_losses(
    name, model, packs, processor, arguments, tmp_path, fresh_compiler, request
):
    """And its checkpoint the names and types of a run without the option."""
    if "float8" in name:
        pytest.importorskip("torchao", reason="needs the package torchao")
    folder, original = tmp_path / "run", copy.deepcopy(model.state_dict())

    def train(resume: bool):
        model = OpenQwen2VLForConditionalGeneration._from_config(
            copy.deepcopy(config), attn_implementation="packed_varlen", dtype=torch.float32
        )
        model.load_state_dict(original)
        options = {"train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 2, "max_steps": 3}
        torch.manual_seed(0)
        model = add_lora(model) if "LoRA" in name else model
        trainer = PackedTrainer(
            model, arguments(**options, **OPTIONS[name]), train_dataset=packs, processing_class=processor
        )
        trainer.train(resume_from_checkpoint=resume)
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return losses, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}

    config = copy.deepcopy(model.config)
    losses, weights = train(False)
    (saved,) = (folder / "checkpoint-2").glob("*model.safetensors")
    saved = load_file(saved)
    if "LoRA" not in name:
        kept = {n: w.dtype for n, w in saved.items() if "vision_tower" not in n}
        assert kept == {n: torch.float32 for n in original if "vision_tower" not in n and n != "lm_head.weight"}
        assert set(saved) | {"lm_head.weight"} == set(original)
    assert not any("_orig_mod" in n or "float8" in n.lower() for n in saved)
    shutil.rmtree(folder / "checkpoint-3")
    again, weights_again = train(True)
    assert again == losses and len(losses) == 3
    assert all(torch.equal(weights[n], weights_again[n]) for n in weights)
