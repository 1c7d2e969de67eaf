"""What a GPU does that no GPU has done yet: the calls of torch's varlen attention, and blocks compiled around them."""

import copy
import inspect

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoConfig

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, prepare_for_packing
from open_qwen2vl.families import packed_model
from open_qwen2vl.families.qwen_vl.processing import QwenVLDocuments
from open_qwen2vl.modeling import attention
from open_qwen2vl.trainer.fused_step import compile_blocks
from tests.families.qwen_vl.packs import mixed_documents, pack
from tests.modeling.packs import forward_inputs, join, make_document
from tests.modeling.varlen_on_cpu import attend, varlen_on_cpu
from tests.qwen_vl import FAMILIES, make_model, make_processor

CAPTIONS = ["a cat", "two dogs run in the park", "x", "blue and green squares, red circles on a mat", "what is shown"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    assert query.shape[1] == key.shape[1] == value.shape[1]
    return attend(query, key, value, cu_seq_q, cu_seq_k, window_size[1] == 0, scale, window_size[0])[0]


@pytest.mark.parametrize(("scaling", "window"), [(None, None), (16**-0.5, 4), (0.3, None)])
def test_the_oldest_and_the_installed_signature_take_our_calls(monkeypatch, scaling, window):
    """2.11 knows no groups of heads; 2.12 and later do, under the same names. The third document is a branch."""
    assert inspect.signature(of_2_11).parameters.keys() <= inspect.signature(varlen_attn).parameters.keys()
    torch.manual_seed(0)
    queries, keys = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 3, 4, 11], [0, 3, 4, 13]))
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 10])
    query, key, value = (torch.randn(11, heads, 16) for heads in (4, 2, 2))
    expected = attention._bucketed_sdpa(query, key, value, queries, keys, positions, scaling, window)
    call = (query, key[positions], value[positions], queries, keys, 7, 9, scaling, window)
    with varlen_on_cpu(monkeypatch):
        torch.testing.assert_close(attention._flash_varlen(*call), expected, **TOLERANCE)
    monkeypatch.setattr(attention, "varlen_attn", of_2_11)
    monkeypatch.setattr(attention, "_HAS_GQA", False)
    torch.testing.assert_close(attention._flash_varlen(*call), expected, **TOLERANCE)


def test_heads_of_the_gpu_tests_suit_the_kernels(gpu_backbones):
    """flash and cuDNN take widths that are multiples of 8; the shared tiny model's is 12."""
    config = AutoConfig.from_pretrained(gpu_backbones["text"])
    assert config.head_dim % 8 == 0


def open_qwen2vl(backbones, tokenizer):
    torch.manual_seed(0)
    options = {"image_seq_length": 4, "attn_implementation": "packed_varlen"}
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, **options).train()
    model.model.vision_tower.requires_grad_(False)
    documents = [make_document(tokenizer, caption, seed) for seed, caption in enumerate(CAPTIONS)]
    return model, [forward_inputs([join(documents[i:j])]) for i, j in ((0, 3), (1, 5), (2, 4), (0, 5), (3, 5))]


def qwen_vl(family, tokenizer):
    processor = make_processor(family, tokenizer)
    text = {"hidden_size": 64} | ({} if family != "qwen3_vl" else {"head_dim": 16})
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    model = prepare_for_packing(make_model(family, tokenizer, **text), processor).train()
    documents = mixed_documents(QwenVLDocuments(processor))
    return model, [pack([documents[i:j]]) for i, j in ((0, 6), (4, 9), (2, 7), (0, 3), (0, 9))]


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss, [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    "family", ["open_qwen2vl", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES)]
)
def test_after_two_packs_nothing_is_compiled_anew(
    family, gpu_backbones, tokenizer, qwen_vl_tokenizer, monkeypatch, fresh_compiler
):
    """Packs of other lengths, documents and images; each block is one graph, loss and gradients are the same."""
    made = open_qwen2vl(gpu_backbones, tokenizer) if family == "open_qwen2vl" else qwen_vl(family, qwen_vl_tokenizer)
    model, batches = made
    expected = [loss_and_gradients(model, batch) for batch in batches]
    compiled = copy.deepcopy(model)
    compile_blocks(compiled, packed_model(model.config), "aot_eager", None)
    with varlen_on_cpu(monkeypatch):
        for number, batch in enumerate(batches):
            with torch.compiler.set_stance("fail_on_recompile" if number >= 2 else "default"):
                found = loss_and_gradients(compiled, batch)
            torch.testing.assert_close(found, expected[number], atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
