"""A step on packs asks the device for nothing that the host would wait for, as far as a CPU can tell."""

import inspect
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from open_qwen2vl import prepare_for_packing
from open_qwen2vl.families.qwen_vl.processing import QwenVLDocuments
from open_qwen2vl.families.qwen_vl.tower_inputs import tower_inputs
from open_qwen2vl.modeling.attention import _bucketed_sdpa
from open_qwen2vl.modeling.modeling_open_qwen2vl import OpenQwen2VLForConditionalGeneration
from tests.families.qwen_vl.packs import collated, mixed_documents
from tests.families.qwen_vl.packs import make_document as qwen_vl_document
from tests.modeling.packs import forward_inputs, join, join_branches, make_document
from tests.qwen_vl import FAMILIES, make_model, make_processor

# Their results have a size, or become a number, that only the device knows.
WAITS = ("masked_select", "nonzero", "_local_scalar_dense", "equal", "_unique2", "repeat_interleave", "bincount")
WAITS += ("masked_scatter", "masked_scatter_backward", "unique_consecutive", "unique_dim", "argwhere")
# They count a mask; indices of int64 they take as they are.
BY_MASK = ("index", "index_put", "index_put_", "_index_put_impl_")
# A CPU's stand-in for the kernel of a GPU, and what is computed of lists, before anything goes to the device.
ON_HOST = tuple(inspect.unwrap(function).__code__ for function in (_bucketed_sdpa, tower_inputs))


class Waits(TorchDispatchMode):
    """Collects what a host would wait for in a forward and backward: operators, and reading a tensor as a list."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        for name in ("tolist", "numpy", "cpu"):
            self._patch.setattr(torch.Tensor, name, self._noted(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.undo()
        return super().__exit__(*error)

    def _noted(self, name, method):
        def noted(*args, **kwargs):
            self._note(name)
            return method(*args, **kwargs)

        return noted

    def _note(self, name):
        if not _called_on_host():
            self.found.add(name)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if name in WAITS or (name in BY_MASK and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self._note(name)
        return operator(*args, **(kwargs or {}))


def _called_on_host() -> bool:
    frame = sys._getframe()
    while frame is not None and frame.f_code not in ON_HOST:
        frame = frame.f_back
    return frame is not None


@pytest.fixture(scope="module")
def items(tokenizer) -> list[dict]:
    captions = ["a cat", "two dogs run in the park", "x", "blue and green squares, red circles on a mat"]
    documents = [make_document(tokenizer, caption, seed) for seed, caption in enumerate(captions)]
    return [join(documents[:1]), join(documents[1:])]


@pytest.fixture(scope="module")
def branches(tokenizer) -> dict:
    """A pack of three captions on one picture, which takes the first five positions."""
    return join_branches([make_document(tokenizer, caption, 0) for caption in ("a cat", "x", "two dogs run")], 5)


def load(backbones) -> OpenQwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    options = {"image_seq_length": 4, "attn_implementation": "packed_varlen"}
    return OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, **options).train()


@pytest.fixture(scope="module", params=FAMILIES)
def qwen_vl(request, qwen_vl_tokenizer):
    """A model, and its batches: images and clips, images alone, neither."""
    processor = make_processor(request.param, qwen_vl_tokenizer)
    layout = QwenVLDocuments(processor)
    documents = mixed_documents(layout)
    texts = [qwen_vl_document(layout, ["only words"])]
    batches = [collated(layout, rows) for rows in ([documents[:5], documents[5:]], [documents[:4]], [texts])]
    return prepare_for_packing(make_model(request.param, qwen_vl_tokenizer), processor).train(), batches


def waits(model, inputs: dict) -> set[str]:
    with Waits() as mode:
        model(**inputs, num_items_in_batch=torch.tensor(40.0)).loss.backward()
    return mode.found


def test_a_packed_step_waits_for_nothing(backbones, items, branches):
    model, inputs = load(backbones), forward_inputs(items)
    assert not waits(model, inputs)
    shared = forward_inputs([*items, branches])
    assert "key_positions" in shared and not waits(model, shared)
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


@pytest.mark.parametrize("kind", range(3), ids=["images and clips", "images", "text"])
def test_a_packed_step_of_qwen_vl_waits_for_nothing(qwen_vl, kind):
    model, batches = qwen_vl
    assert not waits(model, batches[kind])


def test_the_stock_forward_of_qwen_vl_waits(qwen_vl):
    """Which the packed one does without; on a document alone, as it knows no packs."""
    model, (_, images, _) = qwen_vl
    names = ("input_ids", "labels", "pixel_values")
    inputs = {name: images[name] for name in names} | {"image_grid_thw": torch.tensor(images["image_grid_thw"])}
    inputs["mm_token_type_ids"] = (images["input_ids"] == model.config.image_token_id).int()
    known = {"masked_scatter", "masked_scatter_backward", "repeat_interleave", "tolist"}
    known |= {"index", "index_put_"} if model.config.model_type == "qwen3_vl" else set()
    assert waits(model, inputs) >= known


@pytest.mark.parametrize("unknown, found", [("grids", "tolist"), ("positions", "nonzero")])
def test_what_is_not_known_on_the_host_is_waited_for(qwen_vl, unknown, found):
    """And gives the same: logits and gradients, bit by bit."""
    model, (batch, *_) = qwen_vl
    other = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in batch.items()}
    if unknown == "positions":
        other = {name: value for name, value in batch.items() if name not in ("image_positions", "video_positions")}
    assert waits(model, other) == {found}
    results = []
    for inputs in (batch, other):
        model.zero_grad()
        output = model(**inputs, skip_logits=False)
        output.loss.backward()
        results.append([output.logits, *(p.grad for p in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_another_number_of_qwen_vl_placeholders_is_an_error(qwen_vl):
    model, (batch, *_) = qwen_vl
    count = len(batch["video_positions"])
    with pytest.raises(ValueError, match=f"{count - 1} placeholders of videos and {count} features"):
        model(**{**batch, "video_positions": batch["video_positions"][1:]})
