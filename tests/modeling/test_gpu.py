"""Packed documents stay isolated on a GPU, where `packed_varlen` runs on torch's varlen kernel in half precision."""

import pytest
import torch

from open_qwen2vl import OpenQwen2VLForConditionalGeneration
from tests.modeling.packs import forward_inputs, join, join_branches, make_document

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CAPTIONS = ["a cat", "two dogs run in the park", "x", "blue and green squares, red circles on a mat"]


def to_device(inputs: dict) -> dict:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


@pytest.fixture(params=["eager", "sdpa", "packed_varlen"])
def attention(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(gpu_backbones, attention, request):
    torch.manual_seed(0)
    return OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(
        **gpu_backbones, image_seq_length=4, attn_implementation=attention, dtype=request.param
    ).cuda()


@pytest.fixture
def documents(tokenizer):
    return [make_document(tokenizer, caption, seed) for seed, caption in enumerate(CAPTIONS)]


def test_packed_equals_alone(model, documents):
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    rows = [documents[:3], documents[3:]]
    output = model.train()(**to_device(forward_inputs([join(row) for row in rows])), skip_logits=False)
    for row, logits in zip(rows, output.logits, strict=True):
        start = 0
        for document in row:
            length = len(document["input_ids"])
            inputs = {"input_ids": document["input_ids"][None], "pixel_values": document["pixel_values"]}
            alone = model(**to_device(inputs), skip_logits=False).logits[0]
            torch.testing.assert_close(logits[start : start + length], alone, atol=tolerance, rtol=tolerance)
            start += length
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_branches_of_a_picture_equal_each_alone(model, documents):
    """With fewer queries than keys, which a kernel has to align at the end."""
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    prefix = 1 + documents[0]["image_seq_length"]  # a document start and the picture
    documents = [one | {"pixel_values": documents[0]["pixel_values"]} for one in documents]
    output = model.train()(**to_device(forward_inputs([join_branches(documents, prefix)])), skip_logits=False)
    start = 0
    for number, document in enumerate(documents):
        inputs = {"input_ids": document["input_ids"][None], "pixel_values": document["pixel_values"]}
        alone = model(**to_device(inputs), skip_logits=False).logits[0][prefix if number else 0 :]
        torch.testing.assert_close(output.logits[0, start : start + len(alone)], alone, atol=tolerance, rtol=tolerance)
        start += len(alone)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_changed_document_changes_no_other(model, documents):
    changed = dict(documents[0], pixel_values=255 - documents[0]["pixel_values"])
    before = model(**to_device(forward_inputs([join(documents)]))).logits[0]
    after = model(**to_device(forward_inputs([join([changed, *documents[1:]])]))).logits[0]
    first = len(documents[0]["input_ids"])
    assert not torch.equal(before[:first], after[:first])
    assert torch.equal(before[first:], after[first:])


def test_loss_and_gradients_agree_across_attention(gpu_backbones, documents):
    def run(attention):
        torch.manual_seed(0)
        model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(
            **gpu_backbones, image_seq_length=4, attn_implementation=attention
        ).cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model.train()(**to_device(forward_inputs([join(documents)]))).loss
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters()}

    expected, gradients = run("sdpa")
    loss, ours = run("packed_varlen")
    torch.testing.assert_close(loss, expected, atol=2e-2, rtol=2e-2)
    for name, gradient in ours.items():
        norm = gradients[name].norm()
        assert (gradient - gradients[name]).norm() <= 0.05 * norm + 1e-4, name
