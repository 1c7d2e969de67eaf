"""Patches of one frame through one matrix product: the values and gradients of the stock convolution."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from open_qwen2vl import prepare_for_packing
from tests.qwen_vl import FAMILIES, make_model, make_processor


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family, qwen_vl_tokenizer):
    return make_model(family, qwen_vl_tokenizer)


@pytest.fixture
def processor(family, qwen_vl_tokenizer):
    return make_processor(family, qwen_vl_tokenizer)


@pytest.fixture
def patches(processor) -> torch.Tensor:
    """Normalised `(20, 3 * P * P)`."""
    torch.manual_seed(3)
    return torch.randn(20, 3 * processor.image_processor.patch_size**2)


def doubled(patches: torch.Tensor) -> torch.Tensor:
    """As the stock processor gives them."""
    return patches.unflatten(1, (3, 1, -1)).expand(-1, -1, 2, -1).flatten(1)


def outputs(embedding, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The embedded patches and the gradients of the parameters."""
    embedding.zero_grad()
    embedded = embedding(pixels)
    (embedded.float() * torch.arange(embedded.shape[1]).cos()).sum().backward()
    return [embedded.detach(), *(parameter.grad for parameter in embedding.parameters())]


def test_values_and_gradients_are_the_stock_layers(model, processor, patches):
    stock = copy.deepcopy(model.model.visual.patch_embed)
    embedding = prepare_for_packing(model, processor).model.visual.patch_embed
    assert isinstance(embedding, type(stock)) and type(embedding).__name__ == type(stock).__name__
    expected = outputs(stock, doubled(patches))
    assert len(expected) == 2 + (stock.proj.bias is not None)
    for found, value in zip(outputs(embedding, patches), expected, strict=True):
        torch.testing.assert_close(found, value, atol=1e-5 * value.abs().max().item(), rtol=0)
    assert torch.equal(outputs(embedding, doubled(patches))[0], expected[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_near_as_the_stock_layer(model, processor, patches, autocast):
    """To the stock layer in fp64, values and gradients."""
    stock = copy.deepcopy(model.model.visual.patch_embed)
    embedding = prepare_for_packing(model, processor).model.visual.patch_embed
    if not autocast:
        stock, embedding = stock.bfloat16(), embedding.bfloat16()
    exact = outputs(copy.deepcopy(stock).double(), doubled(patches).double())
    errors = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for layer, pixels in ((stock, doubled(patches)), (embedding, patches)):
            found = outputs(layer, pixels)
            errors.append([(a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)])
    for theirs, ours in zip(*errors, strict=True):
        assert ours <= 1.5 * theirs + 1e-5


def test_an_adapter_on_the_convolution_is_not_passed_by(model, processor, patches):
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["patch_embed.proj"], init_lora_weights=False))
    embedding = adapted.base_model.model.model.visual.patch_embed
    with torch.no_grad():
        expected = embedding(doubled(patches))
        prepare_for_packing(adapted, processor)
        torch.testing.assert_close(embedding(patches), expected, atol=1e-4, rtol=1e-5)
