"""Attention through the interface of transformers: switched, `flex_attention` packed, `packed_varlen` padded."""

import copy

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from open_qwen2vl import OpenQwen2VLForConditionalGeneration
from tests.modeling.packs import forward_inputs, join, make_document

CAPTIONS = ["a cat", "two dogs run in the park", "x", "blue and green squares, red circles on a mat"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
# What flex_attention says of being run without a compiler, and transformers' way of asking for its mask.
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask"),
]


@pytest.fixture(scope="module")
def documents(tokenizer) -> list[dict]:
    return [make_document(tokenizer, caption, seed) for seed, caption in enumerate(CAPTIONS)]


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "compiled"])
def flex_model(tiny_model, request):
    """Flex attention as its plain formula, which takes no compiler; compiled (1 to 2 minutes on a CPU) if slow."""
    tiny_model.set_attn_implementation("flex_attention")
    stance = torch.compiler.set_stance("default" if request.param else "force_eager")
    # flex_attention has no backward on a CPU.
    with stance, torch.no_grad():
        yield tiny_model


def names(model) -> tuple[str, str]:
    return model.model.language_model.config._attn_implementation, model.model.vision_tower.config._attn_implementation


def alone(model, documents: list[dict]) -> list[torch.Tensor]:
    device = model.device
    inputs = ((d["input_ids"][None].to(device), d["pixel_values"].to(device)) for d in documents)
    return [model(input_ids=ids, pixel_values=pixels).logits[0] for ids, pixels in inputs]


def padded(documents: list[dict], side: str) -> dict[str, torch.Tensor]:
    """One document per row, padded with token 0."""
    rows = [torch.ones(len(document["input_ids"]), dtype=torch.long) for document in documents]

    def pad(tensors, value=0):
        return torch.nn.utils.rnn.pad_sequence(tensors, True, value, padding_side=side)

    return {
        "input_ids": pad([document["input_ids"] for document in documents]),
        "attention_mask": pad(rows),
        "labels": pad([document["labels"] for document in documents], -100),
        "pixel_values": torch.cat([document["pixel_values"] for document in documents]),
    }


@torch.no_grad()
def test_switching_changes_the_implementation_and_no_logits(tiny_model, documents):
    inputs = forward_inputs([join(documents[:2]), join(documents[2:])])
    assert names(tiny_model) == ("sdpa", "sdpa")
    expected = tiny_model(**inputs).logits
    for name in ("packed_varlen", "eager", "packed_varlen", "sdpa"):
        tiny_model.set_attn_implementation(name)
        assert names(tiny_model) == (name, name)
        torch.testing.assert_close(tiny_model(**inputs).logits, expected, **TOLERANCE)


@torch.no_grad()
def test_each_backbone_may_have_its_own(tiny_model, documents, tmp_path):
    inputs = forward_inputs([join(documents)])
    expected = tiny_model(**inputs).logits
    tiny_model.set_attn_implementation({"text_config": "packed_varlen", "vision_config": "eager"})
    assert names(tiny_model) == ("packed_varlen", "eager")
    torch.testing.assert_close(tiny_model(**inputs).logits, expected, **TOLERANCE)

    tiny_model.save_pretrained(tmp_path)
    choice = {"text_config": "eager", "vision_config": "sdpa"}
    loaded = OpenQwen2VLForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=choice)
    assert names(loaded) == ("eager", "sdpa")
    # The choice is the user's, not the checkpoint's: another machine may not have it.
    assert names(OpenQwen2VLForConditionalGeneration.from_pretrained(tmp_path)) == ("sdpa", "sdpa")


@torch.no_grad()
def test_every_layer_goes_through_the_interface(tiny_model, documents):
    """As serving engines put their own attention into the model."""
    layers = []

    def noting(module, *args, **kwargs):
        layers.append(module)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("noting", noting)
    inputs = {"input_ids": documents[1]["input_ids"][None], "pixel_values": documents[1]["pixel_values"]}
    expected = tiny_model(**inputs).logits
    tiny_model.set_attn_implementation("noting")
    torch.testing.assert_close(tiny_model(**inputs).logits, expected, **TOLERANCE)
    attention = [block.self_attn for block in tiny_model.model.vision_tower.encoder.layers]
    attention += [block.self_attn for block in tiny_model.model.language_model.layers]
    assert layers == attention


@pytest.mark.parametrize("packs", [1, 2])
def test_flex_attention_packed_equals_alone(flex_model, documents, packs):
    rows = [documents] if packs == 1 else [documents[:1], documents[1:]]
    packed = flex_model(**forward_inputs([join(row) for row in rows])).logits
    flex_model.set_attn_implementation("sdpa")
    for row, logits in zip(rows, packed, strict=True):
        expected = torch.cat(alone(flex_model, row))
        torch.testing.assert_close(logits[: len(expected)], expected, **TOLERANCE)


def test_flex_attention_keeps_a_changed_document_to_itself(flex_model, documents):
    changed = dict(documents[0], pixel_values=255 - documents[0]["pixel_values"])
    before = flex_model(**forward_inputs([join(documents)])).logits[0]
    after = flex_model(**forward_inputs([join([changed, *documents[1:]])])).logits[0]
    first = len(documents[0]["input_ids"])
    assert not torch.equal(before[:first], after[:first])
    assert torch.equal(before[first:], after[first:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["packed_varlen", "eager"])
def test_padded_batches_equal_sdpa(tiny_model, documents, attention, side):
    """Under its own name `packed_varlen` must ask for sdpa's mask, or left padding would be attended to."""
    inputs = padded(documents, side)
    real = inputs["attention_mask"].bool()
    results = {}
    for name in ("sdpa", attention):
        tiny_model.set_attn_implementation(name)
        tiny_model.zero_grad()
        output = tiny_model(**inputs)
        output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in tiny_model.named_parameters()}
        results[name] = output.logits[real].detach(), output.loss.detach(), gradients
    torch.testing.assert_close(results[attention], results["sdpa"], **TOLERANCE)
    # That sdpa itself is right shows against documents that were never padded.
    torch.testing.assert_close(results["sdpa"][0], torch.cat(alone(tiny_model, documents)), **TOLERANCE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padded_prompts_generate_as_with_sdpa(tiny_model, documents, cache):
    inputs = {name: value for name, value in padded(documents, "left").items() if name != "labels"}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "cache_implementation": cache, "disable_compile": True}
    answers = []
    for name in ("sdpa", "packed_varlen"):
        tiny_model.set_attn_implementation(name)
        answers.append(tiny_model.generate(**inputs, **options))
    assert torch.equal(*answers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "attention",
    [
        "flex_attention",
        pytest.param(
            "flash_attention_2",
            marks=pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs the flash-attn package"),
        ),
    ],
)
def test_gpu_implementations_packed_equal_alone(tiny_model, documents, attention):
    config = copy.deepcopy(tiny_model.config)
    # Triton's flex attention takes heads of 16 values or more.
    config.text_config.head_dim = 16
    torch.manual_seed(0)
    model = OpenQwen2VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.cuda().train()
    expected = torch.cat(alone(model, documents))
    model.set_attn_implementation(attention)
    inputs = forward_inputs([join(documents)])
    inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    output = model(**inputs, skip_logits=False)
    # bf16; the logits are of the size of 1.4, and a document that saw another would differ by as much.
    torch.testing.assert_close(output.logits[0], expected, atol=0.25, rtol=0.05)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
