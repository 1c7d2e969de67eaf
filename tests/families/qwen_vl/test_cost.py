"""What a step costs: counted by torch on the stock models, computed here from the config."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from open_qwen2vl import prepare_for_packing
from open_qwen2vl.families.activations import saved_bytes
from open_qwen2vl.families.interface import Media, StepWork
from open_qwen2vl.families.qwen_vl.model import QwenVL
from open_qwen2vl.families.qwen_vl.processing import QwenVLDocuments
from open_qwen2vl.families.qwen_vl.sizes import WINDOW_SIZE
from tests.families.qwen_vl.packs import make_document
from tests.qwen_vl import FAMILIES, make_config, make_model, make_processor

PARTS = ("vision_tower", "projector", "language_model")
SIDE = {"qwen2_vl": 112, "qwen2_5_vl": 112, "qwen3_vl": 128}  # 8 x 8 patches: four whole windows of 2.5


def part_of(name: str) -> str:
    return next((part for part, prefix in QwenVL.parts.items() if name.startswith(prefix)), "language_model")


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family, qwen_vl_tokenizer):
    return make_model(family, qwen_vl_tokenizer, "eager", tie_word_embeddings=False)


def step(family: str, tokenizer, *sides: int) -> tuple[dict, StepWork]:
    """The stock arguments of one document with an image, and its work; a square of 64 patches by default."""
    sides = sides or (SIDE[family], SIDE[family])
    layout = QwenVLDocuments(make_processor(family, tokenizer, max_tokens=64))
    document = make_document(layout, [sides, "a few words"])
    work = layout.vision_work(Media("image", *sides))
    ids = document["input_ids"][None]
    inputs = {
        "input_ids": ids,
        "image_grid_thw": document["image_grid_thw"],
        "pixel_values": torch.randn(work.patches, 6 * layout.sizes.patch_size**2),
        "mm_token_type_ids": (ids == layout.image_token_id).int(),
        "use_cache": False,
    }
    return inputs, StepWork(ids.shape[1], ids.shape[1] ** 2, 1, work)


def test_every_parameter_belongs_to_its_part(model):
    owners = {}
    for name, _ in model.named_parameters():
        owners.setdefault(part_of(name), []).append(name)
    assert set(owners) == set(PARTS)
    assert all("merger" in name and "visual" in name for name in owners["projector"])
    assert all("merger" not in name and "visual" in name for name in owners["vision_tower"])
    assert not any("visual" in name for name in owners["language_model"])
    names = {type(module).__name__ for module in model.modules()}
    assert len(names & set(QwenVL.block_classes)) == 2


def test_a_forward_costs_what_torch_counts(model, family, qwen_vl_tokenizer):
    inputs, work = step(family, qwen_vl_tokenizer)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    # The stock eager attention computes the half above the diagonal as well.
    text = model.config.text_config
    above = 2 * text.num_hidden_layers * text.hidden_size * work.squared_lengths
    assert QwenVL().step_flops(model.config, work, {}) + above == counter.get_total_flops()


@pytest.mark.parametrize("sides", [(140, 196), (224, 112), (84, 252), (364, 84)])
def test_windows_are_counted_as_they_are(qwen_vl_tokenizer, sides):
    """5 x 7 tokens in windows of 4 x 4: of 16, 12, 4 and 3; and so on. An estimate knows squares alone."""
    config = make_config("qwen2_5_vl", qwen_vl_tokenizer, tie_word_embeddings=False)
    config.vision_config.window_size = WINDOW_SIZE
    model = make_model("qwen2_5_vl", qwen_vl_tokenizer, "eager", config=config)
    inputs, work = step("qwen2_5_vl", qwen_vl_tokenizer, *sides)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    text = config.text_config
    above = 2 * text.num_hidden_layers * text.hidden_size * work.squared_lengths
    assert QwenVL().step_flops(config, work, {}) + above == counter.get_total_flops()
    layout = QwenVLDocuments(make_processor("qwen2_5_vl", qwen_vl_tokenizer, max_tokens=64))
    square = layout.vision_work(Media("image", 140, 140))
    assert QwenVL().vision_work(config, 3, 75) == tuple(3 * value for value in square)


@pytest.mark.parametrize(
    "trained", [("language_model",), ("projector",), ("projector", "language_model"), PARTS], ids="+".join
)
def test_a_step_costs_what_torch_counts(model, family, qwen_vl_tokenizer, trained):
    """But for a gradient or two at the edges: of the first layer's input where only the head asks for it."""
    inputs, work = step(family, qwen_vl_tokenizer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)
    with FlopCounterMode(display=False) as counter:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    counts = {part: 1 for part in trained}
    text = model.config.text_config
    above = 3 * 2 * text.num_hidden_layers * text.hidden_size * work.squared_lengths
    computed = QwenVL().step_flops(model.config, work, counts) + above
    assert computed == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_adapters_cost_what_they_have(model, family, qwen_vl_tokenizer):
    _, work = step(family, qwen_vl_tokenizer)
    flops = [QwenVL().step_flops(model.config, work, {"adapter": number}) for number in (1000, 3000)]
    assert flops[1] - flops[0] == 6 * 2000 * work.tokens


@pytest.mark.parametrize(
    "family",
    [pytest.param("qwen2_vl", marks=pytest.mark.slow), pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "qwen3_vl"],
)
def test_activations_are_what_autograd_keeps(family, qwen_vl_tokenizer):
    """One block more is counted than kept, the one that the backward pass works on; so at two blocks and at five."""
    inputs, work = step(family, qwen_vl_tokenizer)
    bounds = torch.tensor([0, work.tokens], dtype=torch.int32)
    batch = {name: inputs[name] for name in ("input_ids", "image_grid_thw", "pixel_values")} | {
        "position_ids": torch.arange(work.tokens).expand(4, 1, -1),
        **{f"cu_seq_lens_{one}": bounds for one in "qk"},
        **{f"max_length_{one}": work.tokens for one in "qk"},
    }
    kept, computed, recomputed = [], [], []
    for blocks in (2, 5):
        config = make_config(family, qwen_vl_tokenizer, num_hidden_layers=blocks)
        config.vision_config.depth = blocks
        model = prepare_for_packing(make_model(family, qwen_vl_tokenizer, config=config))
        kept.append(saved_bytes(model, functools.partial(model, **batch, skip_logits=True), autocast=False))
        for every, figures in ((0, computed), (1, recomputed)):
            figures.append(QwenVL().activation_bytes(config, work, dict.fromkeys(PARTS, 1), checkpoint_every=every))
    assert computed[1] - computed[0] == pytest.approx(kept[1] - kept[0], rel=0.15)
    assert 0.9 * kept[0] < computed[0] < 1.8 * kept[0]
    # Of a block that is computed again only what enters it.
    entrances = work.tokens * config.text_config.hidden_size + work.vision.patches * 32
    assert recomputed[1] - recomputed[0] == pytest.approx(3 * 4 * entrances)
