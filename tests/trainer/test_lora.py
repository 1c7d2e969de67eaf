"""LoRA: what it touches, that it learns, survives saving and merging, and that an adapter of nothing is refused."""

import re

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import AutoPeftModel, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, PackingCollator
from open_qwen2vl.conversion.convert import convert_to_original
from open_qwen2vl.trainer.lora import (
    UNQUANTISED_MODULES,
    add_lora,
    changes_anything,
    load_lora,
    lora_config,
    merged_model,
)
from open_qwen2vl.trainer.model_loading import load_pretrained


@pytest.fixture
def inputs(processor):
    image = Image.linear_gradient("L").convert("RGB")
    return processor(images=[image], text="<s><|image_pad|>\na cat on a mat<|im_end|>", return_tensors="pt")


@pytest.fixture
def base_folder(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load_base(folder):
    return OpenQwen2VLForConditionalGeneration.from_pretrained(folder)


@pytest.fixture
def trained(base_folder, inputs):
    """An adapted model after ten steps, and its losses."""
    torch.manual_seed(0)
    model = add_lora(load_base(base_folder), lora_config(r=4, alpha=8, dropout=0.0)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(10):
        losses.append(model(**inputs, labels=inputs["input_ids"]).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), [loss.item() for loss in losses]


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


def lora_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def test_the_preset():
    config = lora_config()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)
    assert config.modules_to_save == ["multi_modal_projector"]
    assert lora_config(train_projector=False).modules_to_save is None
    assert lora_config(use_rslora=True).use_rslora


def test_language_model_and_projector_train_and_nothing_else(tiny_model):
    towers = sum("self_attn.q_proj" in name for name, _ in tiny_model.model.vision_tower.named_modules())
    model = add_lora(tiny_model)
    assert towers == 2  # SigLIP has layers of the same names
    names = lora_names(model)
    assert len(names) == 7 * 2 and all(".language_model.layers." in name for name in names)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(
        re.search(r"language_model\..*lora_[AB]|multi_modal_projector\.modules_to_save", name) for name in trained
    )
    projector = tiny_model.model.multi_modal_projector
    assert sum("multi_modal_projector" in name for name in trained) == len(projector.original_module.state_dict()) == 4


def test_a_choice_of_modules(tiny_model):
    names = lora_names(add_lora(tiny_model, lora_config(modules=("q_proj", "v_proj"))))
    assert len(names) == 4 and all(name.endswith(("self_attn.q_proj", "self_attn.v_proj")) for name in names)


def test_it_learns_and_leaves_the_base_alone(trained, base_folder, inputs):
    model, losses = trained
    assert losses[-1] < 0.8 * losses[0]
    before = load_base(base_folder).state_dict()
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(load_base(base_folder), inputs))
    kept = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in model.named_parameters()
    }
    assert all(torch.equal(kept[name], value) for name, value in before.items() if name in kept)
    assert set(before) - set(kept) == {"lm_head.weight", *(n for n in before if "multi_modal_projector" in n)}


def test_save_and_reload(trained, base_folder, inputs, tmp_path):
    model, _ = trained
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    projector = {name.split("multi_modal_projector.")[1] for name in saved if "multi_modal_projector" in name}
    assert projector == {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}
    assert not any("vision_tower" in name or "embed_tokens" in name for name in saved)

    expected = logits(model, inputs)
    assert torch.equal(logits(load_lora(load_base(base_folder), tmp_path / "adapter"), inputs), expected)
    # The doors that find the base model by themselves.
    assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter"), inputs), expected)
    by_peft = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["open_qwen2vl"])
    assert torch.equal(logits(by_peft, inputs), expected)


def test_a_loaded_adapter_goes_on_training(trained, base_folder, inputs, tmp_path):
    trained[0].save_pretrained(tmp_path / "adapter")
    model = load_lora(load_base(base_folder), tmp_path / "adapter", is_trainable=True).train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable
    assert any("multi_modal_projector" in name for name in trainable)


def test_merge(trained, inputs, tmp_path):
    model, _ = trained
    expected, answer = logits(model, inputs), model.generate(**inputs, max_new_tokens=6)
    merged = model.merge_and_unload()
    assert type(merged) is OpenQwen2VLForConditionalGeneration and not lora_names(merged)
    torch.testing.assert_close(logits(merged, inputs), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    merged.save_pretrained(tmp_path)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded, inputs), logits(merged, inputs))
    assert torch.equal(reloaded.generate(**inputs, max_new_tokens=6), answer)


def test_merging_is_exact_up_to_rounding(trained, inputs):
    model = trained[0].double()
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].double()}
    expected = logits(model, inputs)
    assert (logits(model.merge_and_unload(), inputs) - expected).abs().max() < 1e-10


def test_a_pack_and_activation_checkpointing(tiny_model, make_pack):
    batch = PackingCollator()([make_pack(4, seed=1)])
    batch.pop("packing_stats")
    alone = tiny_model(**batch).loss
    model = add_lora(tiny_model, lora_config(dropout=0.0)).train()
    model.gradient_checkpointing_enable()
    loss = model(**batch).loss
    torch.testing.assert_close(loss, alone)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=r".*no_such_layer", modules_to_save=["multi_modal_projector"]), "No modules were"),
        (LoraConfig(target_modules=r".*vision_tower.*q_proj"), "changes no module of the language model"),
        (LoraConfig(target_modules=["q_proj"]), "2 modules of the vision tower"),
        (LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["projektor"]), "'projektor'"),
    ],
    ids=["nothing", "vision only", "vision too", "no such projector"],
)
def test_an_adapter_of_the_wrong_modules_is_refused(tiny_model, config, message):
    with pytest.raises(ValueError, match=message):
        add_lora(tiny_model, config)


@pytest.mark.parametrize("modules", [(), ("q_proj", "fc1")])
def test_a_wrong_choice_is_refused(modules):
    with pytest.raises(ValueError, match="choose from q_proj"):
        lora_config(modules=modules)


@pytest.mark.parametrize("part", ["layers", "projector"])
def test_a_loaded_adapter_that_does_not_fit_is_refused(base_folder, tmp_path, part):
    """PEFT itself only warns of updates that it finds no place for."""
    model = add_lora(load_base(base_folder), lora_config(init_lora_weights=False, train_projector=part == "projector"))
    model.save_pretrained(tmp_path / "adapter")
    load_lora(load_base(base_folder), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace(part, "others"): tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="made for another model"):
        load_lora(load_base(base_folder), tmp_path / "adapter")


def test_a_loaded_adapter_that_changes_nothing_is_refused(base_folder, tmp_path):
    add_lora(load_base(base_folder)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="changes nothing"):
        load_lora(load_base(base_folder), tmp_path / "adapter")


def test_a_new_adapter_changes_nothing_yet(tiny_model, inputs):
    before = logits(tiny_model, inputs)
    model = add_lora(tiny_model)
    assert isinstance(model, PeftModel) and not changes_anything(model)
    assert torch.equal(logits(model, inputs), before)
    model.base_model.model.model.multi_modal_projector.modules_to_save["default"].linear_1.bias.data += 1
    assert changes_anything(model)


def test_qlora_quantises_the_language_model_only(base_folder, inputs):
    """4-bit on a CPU: only the blocks of the language model are quantised, and a step trains."""
    options = BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=UNQUANTISED_MODULES, bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForImageTextToText.from_pretrained(base_folder, quantization_config=options)
    quantised = {name for name, module in base.named_modules() if isinstance(module, Linear4bit)}
    assert len(quantised) == 7 * len(base.model.language_model.layers)
    assert all(name.startswith("model.language_model.layers.") for name in quantised)
    adapted = add_lora(base, lora_config(dropout=0.0)).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert changes_anything(adapted)


def test_an_adapter_becomes_a_model_again(tiny_model, processor, tmp_path):
    """Merged into the base that it names, with the projector's own weights; also in the original's layout."""
    tiny_model.save_pretrained(tmp_path / "base" / "model")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base" / "model")
    adapted = add_lora(base, lora_config(r=2))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.full_like(parameter, 0.01))
    adapted.save_pretrained(tmp_path / "run" / "model")
    expected = adapted.merge_and_unload().state_dict()
    merged = merged_model(tmp_path / "run" / "model", dtype="auto").state_dict()
    assert expected.keys() == merged.keys() and all(torch.equal(merged[name], expected[name]) for name in expected)
    processor.save_pretrained(tmp_path / "run" / "model")
    for attention in ("eager", "packed_varlen"):
        loaded, _ = load_pretrained(str(tmp_path / "run"), "float32", attention)
        assert loaded.model.language_model.config._attn_implementation == attention
    convert_to_original(tmp_path / "run", tmp_path / "original")
    saved = torch.load(tmp_path / "original/checkpoints/latest-checkpoint.pt", weights_only=True)["model"]
    query = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(saved["llm_backbone"]["llm.model.layers.0.self_attn.q_proj.weight"], expected[query])
    assert not torch.equal(expected[query], tiny_model.state_dict()[query])
