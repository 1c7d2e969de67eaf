"""A step on packs asks the device for nothing that the host would wait for, as far as a CPU can tell."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from open_qwen2vl.modeling.attention import _bucketed_sdpa
from open_qwen2vl.modeling.modeling_open_qwen2vl import OpenQwen2VLForConditionalGeneration
from tests.modeling.packs import forward_inputs, join, make_document

# Their results have a size, or become a number, that only the device knows.
WAITS = ("masked_select", "nonzero", "_local_scalar_dense", "equal", "_unique2", "repeat_interleave", "bincount")
# A CPU's stand-in for the kernel of a GPU.
STAND_IN = _bucketed_sdpa.__wrapped__.__code__


class Waits(TorchDispatchMode):
    """Collects the operators of forward and backward that a host would wait for."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if name in WAITS and not _called_by(STAND_IN):
            self.found.add(name)
        return operator(*args, **(kwargs or {}))


def _called_by(code) -> bool:
    frame = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


@pytest.fixture(scope="module")
def items(tokenizer) -> list[dict]:
    captions = ["a cat", "two dogs run in the park", "x", "blue and green squares, red circles on a mat"]
    documents = [make_document(tokenizer, caption, seed) for seed, caption in enumerate(captions)]
    return [join(documents[:1]), join(documents[1:])]


def load(backbones) -> OpenQwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    options = {"image_seq_length": 4, "attn_implementation": "packed_varlen"}
    return OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, **options).train()


def waits(model, inputs: dict) -> set[str]:
    with Waits() as mode:
        model(**inputs, num_items_in_batch=torch.tensor(40.0)).loss.backward()
    return mode.found


def test_a_packed_step_waits_for_nothing(backbones, items):
    model, inputs = load(backbones), forward_inputs(items)
    assert not waits(model, inputs)
    # And a mask, whose backward hides a wait, is found.
    assert waits(model, {name: value for name, value in inputs.items() if name != "image_positions"})


def test_positions_of_placeholders_change_nothing(backbones, items):
    model, inputs = load(backbones), forward_inputs(items)
    found = []
    for given in (inputs, {k: v for k, v in inputs.items() if k != "image_positions"}):
        model.zero_grad()
        output = model(**given, skip_logits=False)
        output.loss.backward()
        found.append([output.logits, *(p.grad for p in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_another_number_of_placeholders_is_an_error(backbones, items):
    inputs = forward_inputs(items)
    inputs["image_positions"] = inputs["image_positions"][1:]
    with pytest.raises((RuntimeError, IndexError), match="index"):
        load(backbones)(**inputs)
