import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from open_qwen2vl import OpenQwen2VLConfig, OpenQwen2VLForConditionalGeneration, PackingCollator
from open_qwen2vl.families import packed_model
from open_qwen2vl.families.interface import StepWork
from open_qwen2vl.families.open_qwen2vl_model import (
    OpenQwen2VLPackedModel,
    language_model_parameters,
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


def step_flops(config, tokens, squared, images, budget, **trained):
    """Of all parts but the vision tower, where `trained` says nothing else."""
    work = StepWork(tokens, squared, images, OpenQwen2VLPackedModel().vision_work(config, images, images * budget))
    parts = {"projector": 1, "language_model": 1, "vision_tower": 0, "adapter": 0}
    return OpenQwen2VLPackedModel().step_flops(config, work, {**parts, **trained})


def test_flops_of_a_full_size_pack_by_hand():
    """23 documents of 178 tokens, an image of 144 tokens each, in the 2B model with its frozen vision tower."""
    documents, length = 23, 178
    language = 6 * 1_543_714_304 * documents * length + 6 * 28 * 1536 * documents * length**2
    block = 4 * (1152 * 1152 + 1152) + (1152 * 4304 + 4304) + (4304 * 1152 + 1152) + 4 * 1152
    vision = 26 * (2 * block * 729 + 4 * 1152 * 729**2) * documents
    projector = 6 * (1152 * 1536 + 1536 + 1536 * 1536 + 1536) * 144 * documents
    size = (OpenQwen2VLConfig(), documents * length, documents * length**2, documents, 144)
    assert step_flops(*size) == language + vision + projector == 52_941_463_945_152
    assert step_flops(*size, vision_tower=1) == language + 3 * vision + projector
    assert step_flops(*size, projector=0) == language + vision + projector // 3
    through = 4 * 1_543_714_304 * documents * length
    assert step_flops(*size, language_model=0) == language + vision + projector - through // 2


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
    ours = step_flops(config, tokens, stats["squared_lengths"], 1, 4, vision_tower=int(train_vision_tower))
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


def test_a_number_of_tokens_that_the_tower_has_not_is_refused(tiny_model):
    tiny_model.config.image_seq_length = 5
    with pytest.raises(ValueError, match="image_seq_length=5 must be a square number between 1 and 16"):
        packed_model(tiny_model.config).prepare(tiny_model)
