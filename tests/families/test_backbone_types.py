"""What the pipeline asks of every pair of backbones: blocks and parts, FLOPs, activations, targets of LoRA."""

import pytest
import torch

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor
from open_qwen2vl.families import packed_model
from open_qwen2vl.families.interface import StepWork
from open_qwen2vl.families.open_qwen2vl_memory import language_model_kept, vision_tower_kept
from open_qwen2vl.families.open_qwen2vl_model import language_model_parameters, vision_parameters
from open_qwen2vl.modeling.vision import vision_blocks
from open_qwen2vl.trainer.lora import ATTENTION_MODULES, MLP_MODULES, add_lora
from open_qwen2vl.trainer.optimization import part_of
from tests.estimate.test_memory import kept_bytes
from tests.tiny_backbones import REGISTERED, WINDOWED, pairs

EACH = pytest.mark.parametrize(("vision", "text"), pairs(WINDOWED, REGISTERED))


@pytest.fixture
def model(vision, text, backbone_folder):
    torch.manual_seed(0)
    folders = (backbone_folder(vision), backbone_folder(text))
    return OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(*folders, image_seq_length=4)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@EACH
def test_blocks_parts_and_work_are_found(model):
    family, config = packed_model(model.config), model.config
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in family.block_classes]
    parts = [part_of(f"{name}.", family.parts) for name in blocks]
    assert parts == ["vision_tower"] * 2 + ["language_model"] * 2
    assert language_model_parameters(config.text_config) == count(model.model.language_model)
    assert vision_parameters(config) == count(vision_blocks(model.model.vision_tower))
    features = model.get_image_features(torch.zeros((1, 3, 32, 32), dtype=torch.uint8)).last_hidden_state
    assert features.shape[1] == config.tower_length
    work = StepWork(100, 5000, 2, family.vision_work(config, 2, 8))
    trained = {"vision_tower": 1, "projector": 1, "language_model": 1}
    text = config.text_config
    width = text.num_attention_heads * getattr(text, "head_dim", 12)
    longer = family.step_flops(config, work._replace(squared_lengths=5001), trained)
    assert longer - family.step_flops(config, work, trained) == 6 * text.num_hidden_layers * width


@pytest.mark.parametrize(("vision", "text"), pairs(REGISTERED))
def test_activations_are_those_that_autograd_keeps(model):
    """By blocks on tensors without contents, and whole on real ones."""
    config, text, tower = model.config, model.model.language_model.train(), model.model.vision_tower.train()
    model.set_attn_implementation("sdpa")
    kept = language_model_kept(config, True, torch.float32, False)
    embeds = torch.randn(1, 100, 48, requires_grad=True)
    kinds = getattr(config.text_config, "layer_types", None)
    mask = dict.fromkeys(kinds) if kinds else torch.ones((1, 1, 1, 1), dtype=torch.bool)
    real = kept_bytes(text, lambda: text(inputs_embeds=embeds, attention_mask=mask, use_cache=False))
    # One block more is counted, that of the backward pass.
    assert kept.bytes(100) - kept.block * 100 == pytest.approx(real, rel=0.02)
    kept = vision_tower_kept(config, torch.float32, False)
    pixels = torch.randn(2, 3, 32, 32)
    assert kept.bytes(2) - kept.block * 2 == pytest.approx(kept_bytes(tower, lambda: tower(pixels)), rel=0.05)


@EACH
def test_lora_adapts_each_linear_layer_of_the_language_model_alone(model):
    adapted = add_lora(model)
    layers = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert len(layers) == 2 * len(ATTENTION_MODULES + MLP_MODULES)
    assert all("language_model.layers" in name for name in layers)
    trained = {
        name.split(".")[4] for name, one in adapted.named_parameters() if one.requires_grad and "lora" not in name
    }
    assert trained == {"modules_to_save"}


def test_a_processor_that_normalises_otherwise_is_refused(backbone_folder):
    folders = [backbone_folder(kind) for kind in ("clip_vision_model", "llama")]
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(*folders, image_seq_length=4)
    family = packed_model(model.config)
    folders[0] = backbone_folder("siglip_vision_model")
    with pytest.raises(ValueError, match=r"image_mean \[0.48.*and the processor \[0.5, 0.5, 0.5\]"):
        family.prepare(model, OpenQwen2VLProcessor.from_vision_text_pretrained(*folders, image_seq_length=4))
