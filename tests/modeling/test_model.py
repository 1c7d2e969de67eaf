"""The model: token budgets, what exists and what trains, batches without images, generation, saving and loading."""

from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, DynamicCache, pipeline
from transformers.models.siglip import modeling_siglip

from open_qwen2vl import (
    AutoModelForVision2Seq,
    OpenQwen2VLConfig,
    OpenQwen2VLForConditionalGeneration,
    OpenQwen2VLModel,
)

PROMPT = "<s><|image_pad|>\na cat"


@pytest.fixture
def inputs(processor):
    image = Image.linear_gradient("L").convert("RGB")
    return processor(images=[image], text=PROMPT, return_tensors="pt")


def test_default_sizes_are_the_papers():
    config = OpenQwen2VLConfig()
    with torch.device("meta"):
        model = OpenQwen2VLForConditionalGeneration(config)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(model.model.language_model) == 1_543_714_304
    assert count(model.model.multi_modal_projector) == 4_131_840
    assert len(model.model.vision_tower.encoder.layers) == 26
    # SigLIP-SO400M has 428,225,600; its last block, final norm and pooling head are not part of this model.
    block = count(model.model.vision_tower.encoder.layers[0])
    assert count(model.model.vision_tower) == 1152 * (3 * 14 * 14 + 1) + 729 * 1152 + 26 * block


def test_every_parameter_gets_a_gradient(tiny_model, inputs):
    output = tiny_model.train()(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    without = [name for name, p in tiny_model.named_parameters() if p.grad is None or not p.grad.any()]
    # Keys have no gradient from a bias that is the same for all of them: softmax does not see it.
    assert [name for name in without if "k_proj.bias" not in name] == []


@pytest.mark.parametrize(("layer", "blocks"), [(-1, 3), (-2, 2), (1, 1), (0, 0)])
def test_features_are_the_hidden_states_of_the_layer(backbones, layer, blocks):
    from transformers import SiglipVisionModel

    full = SiglipVisionModel.from_pretrained(backbones["vision"])
    config = OpenQwen2VLConfig(vision_config=full.config, text_config={"hidden_size": 8}, image_seq_length=4)
    config.vision_feature_layer = layer
    from open_qwen2vl.modeling.modeling_open_qwen2vl import truncate_vision_tower

    pixels = torch.randn(2, 3, 32, 32)
    expected = full(pixels, output_hidden_states=True).hidden_states[layer]
    tower = truncate_vision_tower(full, config)
    assert len(tower.encoder.layers) == blocks
    assert torch.equal(tower(pixels).last_hidden_state, expected)


def test_one_set_of_weights_serves_every_budget(tiny_model, processor, tmp_path):
    image = Image.linear_gradient("L").convert("RGB")
    logits = {}
    for budget in (1, 4, 9, 16):
        inputs = processor(images=[image], text=PROMPT, image_seq_length=budget, return_tensors="pt")
        logits[budget] = tiny_model(**inputs).logits
        tiny_model.save_pretrained(tmp_path)
        again = OpenQwen2VLForConditionalGeneration.from_pretrained(tmp_path, image_seq_length=budget)
        assert again.config.image_seq_length == budget
        # The config's budget is what a call without one gets.
        inputs.pop("image_seq_length", None)
        torch.testing.assert_close(again(**inputs).logits, logits[budget])


@pytest.mark.parametrize("budget", [0, 2, 25, -4])
def test_a_budget_that_does_not_fit_is_refused(tiny_model, inputs, budget):
    with pytest.raises(ValueError, match="square number between 1 and 16"):
        tiny_model(**{**inputs, "image_seq_length": budget})
    with pytest.raises(ValueError, match=f"image_seq_length={budget}"):
        OpenQwen2VLConfig(vision_config={"image_size": 32, "patch_size": 8}, image_seq_length=budget)


def test_images_of_another_size_are_refused(tiny_model, inputs):
    with pytest.raises(ValueError, match="takes 32x32 images"):
        tiny_model(input_ids=inputs["input_ids"], pixel_values=torch.zeros(1, 3, 48, 32))


def test_placeholders_and_features_must_agree(tiny_model, inputs):
    with pytest.raises(ValueError, match="tokens: 4, features: 8"):
        tiny_model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))


def test_pixels_as_uint8_equal_floats(tiny_model, processor, inputs):
    image = Image.linear_gradient("L").convert("RGB")
    floats = tiny_model(**inputs).logits
    quantised = tiny_model(**{**inputs, "pixel_values": processor.resize_images([image])}).logits
    torch.testing.assert_close(quantised, floats, atol=1e-5, rtol=1e-5)


def test_a_batch_without_images_reaches_every_trained_parameter(tiny_model, processor):
    """On several ranks a missing gradient or a missing collective would hang the others."""
    tiny_model.train()
    inputs = processor(text=["<s>a cat on a mat"], return_tensors="pt")
    loss = tiny_model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None for p in tiny_model.parameters())
    assert not any(p.grad.any() for p in tiny_model.model.multi_modal_projector.parameters())
    tiny_model.eval()
    torch.testing.assert_close(tiny_model(**inputs, labels=inputs["input_ids"]).loss, loss)


def test_no_supervised_token_gives_zero_and_finite_gradients(tiny_model, inputs):
    loss = tiny_model.train()(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tiny_model.parameters())


def test_a_frozen_tower_saves_no_activations(tiny_model, inputs):
    tiny_model.model.vision_tower.requires_grad_(False)
    tiny_model.train()
    assert not tiny_model.model.get_image_features(inputs["pixel_values"]).last_hidden_state.requires_grad
    tiny_model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is None for p in tiny_model.model.vision_tower.parameters())
    assert all(p.grad is not None for p in tiny_model.model.multi_modal_projector.parameters())


def test_logits_only_where_asked(tiny_model, inputs):
    labels = inputs["input_ids"]
    assert tiny_model.train()(**inputs, labels=labels).logits is None
    assert tiny_model(**inputs, labels=labels, skip_logits=False).logits.shape[:2] == labels.shape
    assert tiny_model.eval()(**inputs, labels=labels).logits.shape[:2] == labels.shape
    assert tiny_model(**inputs, labels=labels, skip_logits=True).logits is None
    assert tiny_model(**inputs, logits_to_keep=1).logits.shape[1] == 1


def test_a_cache_is_built_as_the_config_says_but_not_for_a_loss(tiny_model, inputs):
    assert tiny_model.config.text_config.use_cache is True
    assert tiny_model(**inputs).past_key_values is not None
    assert tiny_model(**inputs, use_cache=False).past_key_values is None
    assert tiny_model(**inputs, labels=inputs["input_ids"]).past_key_values is None
    assert tiny_model.train()(**inputs).past_key_values is None
    tiny_model.eval().config.text_config.use_cache = False
    assert tiny_model(**inputs).past_key_values is None
    assert tiny_model(**inputs, use_cache=True).past_key_values is not None
    assert tiny_model(**inputs, past_key_values=DynamicCache()).past_key_values.get_seq_length() > 0


@pytest.mark.parametrize("attention", ["eager", "sdpa", "packed_varlen"])
def test_generation_of_a_padded_batch_equals_one_by_one(tiny_model, processor, attention):
    tiny_model.set_attn_implementation(attention)
    images = [Image.effect_noise((40, 30), 90).convert("RGB") for _ in range(3)]
    prompts = [(PROMPT, images[:1]), ("<s>two dogs", []), ("<s><|image_pad|><|image_pad|>\nx", images[1:])]
    alone = []
    for text, own in prompts:
        inputs = processor(images=own or None, text=text, return_tensors="pt")
        out = tiny_model.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
        alone.append(out[0, inputs["input_ids"].shape[1] :])
    batch = processor(
        images=[own for _, own in prompts],
        text=[text for text, _ in prompts],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    together = tiny_model.generate(**batch, max_new_tokens=6, min_new_tokens=6)
    assert torch.equal(together[:, batch["input_ids"].shape[1] :], torch.stack(alone))


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForVision2Seq])
def test_save_and_load_with_the_auto_classes(tiny_model, inputs, tmp_path, auto):
    tiny_model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is OpenQwen2VLForConditionalGeneration
    torch.testing.assert_close(loaded(**inputs).logits, tiny_model(**inputs).logits)
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert type(AutoModel.from_pretrained(tmp_path)) is OpenQwen2VLModel


def test_dtype_and_attention_reach_every_part(backbones):
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(
        **backbones, image_seq_length=4, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    configs = [model.config, model.model.vision_tower.config, model.model.language_model.config]
    assert [config._attn_implementation for config in configs] == ["eager"] * 3
    assert not any(p.is_meta for p in model.parameters())
    assert model.generation_config.eos_token_id == model.config.text_config.eos_token_id


def test_a_backbone_of_another_kind_is_refused(backbones):
    with pytest.raises(ValueError, match="'qwen2' cannot be the vision tower"):
        OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(backbones["text"], backbones["text"])


def test_an_option_that_is_mistyped_is_named(backbones):
    build = partial(OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained, **backbones)
    for name, meant in (("dtpye", "dtype"), ("image_seq_len", "image_seq_length")):
        with pytest.raises(TypeError, match=f"knows no option {name!r} .did you mean {meant!r}"):
            build(**{name: "x"})
    # Of a config, known to one backbone or to both.
    for name in ("num_hidden_layers", "num_key_value_heads", "patch_size"):
        with pytest.raises(TypeError, match=f"{name!r} is of a backbone's config.*both"):
            build(**{name: 1})
    for given in ("bf16", "nn"):
        with pytest.raises(ValueError, match=f"dtype is {given!r}, no type of torch"):
            build(dtype=given)


@pytest.mark.parametrize("budget", [[9, 9], [[9], [[9]]], torch.tensor(9), torch.tensor([[9], [9]])])
def test_a_budget_is_read_in_any_nesting(tiny_model, processor, budget):
    """Pipelines and TRL collate what a processor returns, into lists of lists and tensors."""
    images = [Image.effect_noise((40, 30), 90).convert("RGB") for _ in range(2)]
    inputs = processor(images=images, text=[PROMPT] * 2, image_seq_length=9, return_tensors="pt")
    expected = tiny_model(**{**inputs, "image_seq_length": 9}).logits
    assert torch.equal(tiny_model(**{**inputs, "image_seq_length": budget}).logits, expected)


def test_budgets_may_differ_within_a_call(tiny_model, processor):
    """Requests that a server puts into one call: logits and features are those of each alone."""
    images = [Image.effect_noise((40, 30), 90).convert("RGB") for _ in range(3)]
    budgets, rows, alone = [9, 4, 9], [], []
    for image, budget in zip(images, budgets, strict=True):
        inputs = processor(images=image, text=PROMPT, image_seq_length=budget, return_tensors="pt")
        rows.append(inputs)
        alone.append(tiny_model(**inputs).logits)
    pixels = torch.cat([row["pixel_values"] for row in rows])
    features = tiny_model.get_image_features(pixels, image_seq_length=budgets).pooler_output
    for row, budget, given in zip(rows, budgets, features, strict=True):
        (own,) = tiny_model.get_image_features(row["pixel_values"], image_seq_length=budget).pooler_output
        torch.testing.assert_close(given, own, atol=1e-5, rtol=1e-5)
    ids = torch.cat([row["input_ids"] for row in rows], dim=1)
    places = torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None]
    packed = tiny_model(
        input_ids=ids, pixel_values=pixels, position_ids=places, image_seq_length=budgets, **boundaries(rows)
    )
    torch.testing.assert_close(packed.logits, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="image_seq_length has 2 entries for 3 images"):
        tiny_model.get_image_features(pixels, image_seq_length=[4, 9])
    with pytest.raises(ValueError, match="image_seq_length=5 must be a square number between 1 and 16"):
        tiny_model.get_image_features(pixels, image_seq_length=[4, 5, 9])


def boundaries(rows) -> dict:
    lengths = [row["input_ids"].shape[1] for row in rows]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return {name: ends for name in ("cu_seq_lens_q", "cu_seq_lens_k")} | {
        name: max(lengths) for name in ("max_length_q", "max_length_k")
    }


def test_shifted_labels_give_the_same_loss(tiny_model, inputs):
    labels = inputs["input_ids"].clone()
    labels[:, :6] = -100
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = tiny_model(**inputs, labels=labels, num_items_in_batch=7, return_row_losses=True)
    for given in ({"shift_labels": shifted}, {"shift_labels": shifted, "labels": labels}):
        output = tiny_model(**inputs, **given, num_items_in_batch=7, return_row_losses=True)
        assert torch.equal(output.loss, expected.loss) and torch.equal(output.row_losses, expected.row_losses)
    # A part of a sequence predicts its neighbour's first token, which no unshifted labels can say.
    shifted[:, -1] = 3
    with_last = tiny_model(**inputs, shift_labels=shifted).loss
    reference = torch.nn.functional.cross_entropy(tiny_model(**inputs).logits[0], shifted[0])
    torch.testing.assert_close(with_last, reference)
    assert tiny_model.train()(**inputs, shift_labels=shifted).logits is None


def test_classes_not_to_be_split_exist(tiny_model):
    assert tiny_model._no_split_modules == {"Qwen2DecoderLayer", "SiglipEncoderLayer", "SiglipVisionEmbeddings"}


def test_missing_vision_weights_follow_siglips_rule(tiny_model, tmp_path):
    """Every weight of the tower that a file lacks is drawn as SigLIP draws it; what the file has is kept."""
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "vision_tower" not in name or "layers.0" in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = OpenQwen2VLForConditionalGeneration.from_pretrained(tmp_path)
    tower = loaded.model.vision_tower
    torch.testing.assert_close(tower.encoder.layers[0].mlp.fc1.weight, weights[
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight"])  # fmt: skip
    layer, attention = tower.encoder.layers[1], tower.encoder.layers[1].self_attn
    assert isinstance(attention, modeling_siglip.SiglipAttention)
    width, inner = 32, 48
    for weight, bound in [
        (layer.mlp.fc1.weight, (6 / (width + inner)) ** 0.5),
        (attention.q_proj.weight, (3 / width) ** 0.5),
    ]:
        assert bound * 0.9 < weight.abs().max() <= bound
    assert 0.7 < tower.embeddings.position_embedding.weight.std() * width**0.5 < 1.3
    assert 0.7 < tower.embeddings.patch_embedding.weight.std() * (3 * 8 * 8) ** 0.5 < 1.3
    assert layer.mlp.fc1.bias.abs().max() < 1e-5 and not attention.q_proj.bias.any()


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_pipelines_answer_batches_as_single_chats(tiny_model, processor, tmp_path, task):
    tiny_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    chats = []
    for number in (1, 2, 1):
        images = [{"type": "image", "image": Image.effect_noise((40, 30), 90).convert("RGB")} for _ in range(number)]
        content = [*images, {"type": "text", "text": "a cat" + " mat" * number}]
        chats.append([{"role": "user", "content": content}])
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "return_full_text": False}
    answer = pipeline(task, model=str(tmp_path))
    alone = [answer(chat, **asked)[0]["generated_text"] for chat in chats]
    for options in ({}, {"processor_kwargs": {"image_seq_length": 4}}):
        batched = answer(chats, batch_size=2, **asked, **options)
        assert [answers[0]["generated_text"] for answers in batched] == alone
    other = answer(chats, batch_size=2, **asked, processor_kwargs={"image_seq_length": 9})
    assert [answers[0]["generated_text"] for answers in other] != alone
