import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from open_qwen2vl import OpenQwen2VLConfig, OpenQwen2VLForConditionalGeneration, PackingCollator
from open_qwen2vl.trainer.figures.flops import (
    GPUS,
    language_model_parameters,
    peak_flops,
    step_flops,
    vision_parameters,
)


def count(parameters, dims=None):
    return sum(p.numel() for p in parameters if dims is None or p.ndim in dims)


def test_parameter_counts_are_those_of_the_models(tiny_model):
    with torch.device("meta"):
        full_size = OpenQwen2VLForConditionalGeneration(OpenQwen2VLConfig())
    for model in (tiny_model, full_size):
        language = [*model.model.language_model.parameters()]
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight or model is full_size
        assert language_model_parameters(model.config.text_config) == count(language)
        assert vision_parameters(model.config) == count(model.model.vision_tower.encoder.layers.parameters())
    assert language_model_parameters(full_size.config.text_config) == 1_543_714_304


def test_flops_of_a_full_size_pack_by_hand():
    """23 documents of 178 tokens, an image of 144 tokens each, in the 2B model with its frozen vision tower."""
    documents, length = 23, 178
    language = 6 * 1_543_714_304 * documents * length + 6 * 28 * 1536 * documents * length**2
    block = 4 * (1152 * 1152 + 1152) + (1152 * 4304 + 4304) + (4304 * 1152 + 1152) + 4 * 1152
    vision = 26 * (2 * block * 729 + 4 * 1152 * 729**2) * documents
    projector = 6 * (1152 * 1536 + 1536 + 1536 * 1536 + 1536) * 144 * documents
    size = (OpenQwen2VLConfig(), documents * length, documents * length**2, documents, 144)
    assert step_flops(*size) == language + vision + projector == 52_941_463_945_152
    assert step_flops(*size, train_vision_tower=True) == language + 3 * vision + projector
    assert step_flops(*size, train_projector=False) == language + vision + projector // 3
    through = 4 * 1_543_714_304 * documents * length
    assert step_flops(*size, train_language_model=False) == language + vision + projector - through // 2


@pytest.mark.parametrize("train_vision_tower", [False, True])
def test_flops_agree_with_what_torch_counts(tiny_model, make_pack, train_vision_tower):
    """Equal to the last operation, once the differences that the definition makes on purpose are taken out."""
    model, config = tiny_model.train(), tiny_model.config
    model.set_attn_implementation("eager")
    model.model.vision_tower.requires_grad_(train_vision_tower)
    batch = PackingCollator()([make_pack(1, seed=3)])
    stats = batch.pop("packing_stats")
    # The head is counted at every position, so let every one be labelled.
    batch["labels"] = batch["input_ids"].clone()
    batch.pop("label_positions")
    with FlopCounterMode(display=False) as counter:
        model(**batch, num_items_in_batch=1).loss.backward()

    tokens, text, vision = stats["tokens"], config.text_config, config.vision_config
    ours = step_flops(config, tokens, stats["squared_lengths"], 1, 4, train_vision_tower=train_vision_tower)
    passes = 3 if train_vision_tower else 1
    adjusted = (
        ours
        + 6 * text.num_hidden_layers * text.hidden_size * tokens**2  # torch: the upper triangle of the scores too
        - 6 * text.vocab_size * text.hidden_size  # nothing follows the last position
        - 6 * tokens * count(model.model.language_model.parameters(), dims={1})  # biases and norms multiply nothing
        - 6 * 4 * count(model.model.multi_modal_projector.parameters(), dims={1})
        - passes * 2 * 16 * count(model.model.vision_tower.encoder.parameters(), dims={1})
    )
    patch_embedding = 2 * 16 * 3 * 8 * 8 * vision.hidden_size  # not one of the blocks; pixels need no gradient
    adjusted += patch_embedding * (2 if train_vision_tower else 1)
    if not train_vision_tower:
        adjusted -= 2 * 4 * vision.hidden_size * text.hidden_size  # pooled features need no gradient
    assert counter.get_total_flops() == adjusted


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("cpu", None),
    ],
)
def test_peaks_by_device_name(name, teraflops):
    assert peak_flops(name) == (teraflops and teraflops * 1e12)


def test_every_kind_of_gpu_is_found_by_its_own_name():
    names = {
        "gb200": "NVIDIA GB200",
        "b200": "NVIDIA B200",
        "h200-nvl": "NVIDIA H200 NVL",
        "h200": "NVIDIA H200",
        "h100-pcie": "NVIDIA H100 PCIe",
        "h100-nvl": "NVIDIA H100 NVL",
        "h100": "NVIDIA H100 80GB HBM3",
        "a100-40gb": "NVIDIA A100-SXM4-40GB",
        "a100-80gb": "NVIDIA A100 80GB PCIe",
        "l40s": "NVIDIA L40S",
        "rtx4090": "NVIDIA GeForce RTX 4090",
        "rtx5090": "NVIDIA GeForce RTX 5090",
        "rtx3090": "NVIDIA GeForce RTX 3090",
        "v100-32gb": "Tesla V100-SXM2-32GB",
        "v100-16gb": "Tesla V100-SXM2-16GB",
        "mi300x": "AMD Instinct MI300X",
        "a40": "NVIDIA A40",
        "a10": "NVIDIA A10",
        "l4": "NVIDIA L4",
        "a6000": "NVIDIA RTX A6000",
    }
    for kind, name in names.items():
        assert next(other for other, gpu in GPUS.items() if re.search(gpu.device_name, name)) == kind
    assert names.keys() == GPUS.keys()


def test_the_papers_run():
    """28.4M pairs of 176 tokens; 7.11e19 is with attention over whole packs and with the block that is not used."""
    config, pairs, length = OpenQwen2VLConfig(), 28_400_000, 176
    tokens = pairs * length
    isolated, whole_packs = (
        step_flops(config, tokens, squared, pairs, 144) for squared in (pairs * length**2, tokens * 4096)
    )
    language = 6 * 1_543_714_304 * tokens + 6 * 28 * 1536 * tokens * 4096
    assert language == pytest.approx(5.16e19, rel=1e-3)
    assert whole_packs == pytest.approx(7.11e19, rel=0.02) and whole_packs < 7.11e19
    # Attention over whole packs is 1.06 GFLOP a token, of which the documents' own is 0.05.
    assert 6 * 28 * 1536 * 4096 == pytest.approx(1.06e9, rel=5e-3)
    assert (whole_packs - isolated) / tokens == pytest.approx(1.06e9 - 0.045e9, rel=5e-3)
    assert isolated == pytest.approx(6.48e19, rel=1e-3)
