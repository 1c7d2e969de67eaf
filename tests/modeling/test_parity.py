"""The numbers of the original's code, on the small random weights of tests/assets/original."""

import hashlib
import json
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Config, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from open_qwen2vl import (
    OpenQwen2VLConfig,
    OpenQwen2VLForConditionalGeneration,
    OpenQwen2VLProcessor,
    PackingCollator,
)
from open_qwen2vl.conversion.names import convert_original_tensors
from open_qwen2vl.modeling.configuration_open_qwen2vl import pooled_grid_side
from open_qwen2vl.modeling.modeling_open_qwen2vl import OpenQwen2VLMultiModalProjector
from open_qwen2vl.processing.images import decode_image
from open_qwen2vl.processing.text_formats import prepare_tokenizer
from tests.documents import caption_document, interleaved_document
from tests.modeling.packs import join

ASSETS = Path(__file__).parents[1] / "assets" / "original"
IMAGES = sorted((ASSETS / "images").glob("*.png"))


def assert_parity(actual: torch.Tensor, expected: torch.Tensor) -> None:
    limit = 1e-5 * max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= limit


def make_config(image_token_id: int = 0) -> OpenQwen2VLConfig:
    text = json.loads((ASSETS / "Qwen2.5-tiny" / "config.json").read_text())
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=239,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=84,
        patch_size=14,
        hidden_act="gelu",
    )
    return OpenQwen2VLConfig(
        vision_config=vision, text_config=Qwen2Config(**text), image_token_id=image_token_id, image_seq_length=16
    )


def load_converted(tensors: dict, config: OpenQwen2VLConfig) -> OpenQwen2VLForConditionalGeneration:
    model = OpenQwen2VLForConditionalGeneration(config).eval()
    state, _ = convert_original_tensors(tensors, config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert {name.split(".")[1] for name in missing} <= {"weight", "language_model", "multi_modal_projector"}
    return model


PROJECTOR_CASES = ["27x27_to_144", "27x27_to_729", "6x6_to_16", "7x7_to_9", "5x5_to_25", "10x10_to_49"]


@pytest.mark.parametrize("case", PROJECTOR_CASES)
def test_projector(case):
    golden = {
        name.removeprefix(case + "/"): tensor
        for name, tensor in load_file(ASSETS / "projector.safetensors").items()
        if name.startswith(case + "/")
    }
    config = OpenQwen2VLConfig(vision_config={"hidden_size": 24}, text_config={"hidden_size": 40})
    projector = OpenQwen2VLMultiModalProjector(config)
    original = {name.removeprefix("weight/"): t for name, t in golden.items() if name.startswith("weight/")}
    state, _ = convert_original_tensors({"projector": original}, config)
    projector.load_state_dict({name.removeprefix("model.multi_modal_projector."): t for name, t in state.items()})
    features = golden["input"].clone().requires_grad_()
    budget = golden["output"].shape[1]
    assert_parity(projector.pool(features, budget), golden["pooled"])
    output = projector(features, budget)
    assert_parity(output, golden["output"])
    assert_parity(torch.autograd.grad(output.square().sum(), features)[0], golden["grad_input"])


def test_upsampling_is_pooled_alike_but_refused_as_a_budget():
    golden = load_file(ASSETS / "projector.safetensors")
    pooled = OpenQwen2VLMultiModalProjector.pool(golden["3x3_to_16_upsample/input"], 16)
    assert_parity(pooled, golden["3x3_to_16_upsample/pooled"])
    with pytest.raises(ValueError, match="square number between 1 and 9"):
        pooled_grid_side(16, 3)
    with pytest.raises(ValueError, match="image_seq_length=150"):
        pooled_grid_side(150, 27)


def recorded_order(image: Image.Image) -> Image.Image:
    """Pillow 13, which recorded the pixels, resizes the height of a tall image first and 12 the width; both round."""
    tall = image.height > image.width and int(PIL.__version__.split(".")[0]) < 13
    return image.resize((image.width, 84), Image.Resampling.BICUBIC) if tall else image


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_pixels(path):
    pixels = SiglipImageProcessorPil(size={"height": 84, "width": 84})(recorded_order(decode_image(path.read_bytes())))
    golden = load_file(ASSETS / "vision.safetensors")[f"pixel_values/{path.stem}"]
    assert (torch.as_tensor(pixels["pixel_values"][0]) - golden).abs().max() <= 1e-6


def test_pixels_at_full_size(tokenizer):
    processor = OpenQwen2VLProcessor(SiglipImageProcessorPil(size={"height": 384, "width": 384}), tokenizer)
    checksums = json.loads((ASSETS / "pixels_384.json").read_text())
    checked = 0
    for path in IMAGES:
        if path.stem in checksums:
            pixels = processor.resize_images([decode_image(path.read_bytes())])[0]
            assert hashlib.sha1(pixels.numpy().tobytes()).hexdigest() == checksums[path.stem]["sha1"]
            checked += 1
    assert checked == 3


def test_vision_features():
    golden = load_file(ASSETS / "vision.safetensors")
    timm = {name.removeprefix("state_dict/"): t for name, t in golden.items() if name.startswith("state_dict/")}
    model = load_converted({"vision_backbone": timm}, make_config())
    assert len(model.model.vision_tower.encoder.layers) == 3
    images = [recorded_order(Image.open(path).convert("RGB")) for path in IMAGES]
    pixels = SiglipImageProcessorPil(size={"height": 84, "width": 84})(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.get_image_features(pixels).last_hidden_state
        assert_parity(features, golden["features"])
        quantised = ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8)
        assert_parity(model.get_image_features(quantised).last_hidden_state, golden["features"])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "packed_varlen"])
def test_forward_of_one_image(attention):
    golden = load_file(ASSETS / "forward_single.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "Qwen2.5-tiny")
    image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    checkpoint = torch.load(ASSETS / "checkpoint" / "checkpoints" / "latest-checkpoint.pt", weights_only=True)
    model = load_converted(checkpoint["model"], make_config(image_token_id))
    model.set_attn_implementation(attention)

    def expand(ids: torch.Tensor, value: int) -> torch.Tensor:
        (at,) = torch.nonzero(golden["input_ids"][0] == -200)[0].tolist()
        return torch.cat([ids[0, :at], torch.full((16,), value), ids[0, at + 1 :]])[None]

    input_ids, labels = expand(golden["input_ids"], image_token_id), expand(golden["labels"], -100)
    assert torch.equal(labels, golden["llm_in/labels"])
    with torch.no_grad():
        output = model(input_ids=input_ids, pixel_values=golden["pixel_values"], labels=labels)
    assert_parity(output.logits, golden["logits"])
    assert_parity(output.loss, golden["loss"])


def packed_item(tokenizer, pixel_values: torch.Tensor) -> dict:
    """The original's pack of five documents, laid out by this package from its texts."""
    golden = json.loads((ASSETS / "packed_documents.json").read_text())
    documents = {"doc": interleaved_document(golden["interleaved_texts"], tokenizer, 16)}
    for i, caption in enumerate(golden["captions"]):
        documents[f"k{i}"] = caption_document(caption, tokenizer, 16)
    image = [tokenizer.convert_tokens_to_ids("<|image_pad|>")] * 16
    for name, (input_ids, _) in documents.items():
        assert input_ids.tolist() == [token for i in golden["ids"][name] for token in (image if i == -200 else [i])]
    items = [
        {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.arange(len(input_ids)),
            "pixel_values": pixel_values[:0],
            "image_seq_length": 16,
            "placeholders": {"image_positions": torch.from_numpy(np.flatnonzero(input_ids == image[0]))},
        }
        for input_ids, labels in (documents[name] for name in golden["order"])
    ]
    return join(items) | {"pixel_values": pixel_values}


@pytest.mark.parametrize("attention", ["eager", "sdpa", "packed_varlen"])
def test_pack_whose_documents_see_each_other(attention):
    golden = load_file(ASSETS / "forward_packed.safetensors")
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(ASSETS / "Qwen2.5-tiny"))
    item = packed_item(tokenizer, golden["pixel_values"])
    batch = PackingCollator(cross_document_attention=True)([item])
    assert batch.pop("packing_stats")["documents"] == 5
    # A row's first label has nothing before it and counts for nothing.
    assert torch.equal(batch["labels"][:, 1:], golden["labels"][:, 1:])
    checkpoint = torch.load(ASSETS / "checkpoint" / "checkpoints" / "latest-checkpoint.pt", weights_only=True)
    model = load_converted(checkpoint["model"], make_config(tokenizer.convert_tokens_to_ids("<|image_pad|>")))
    model.set_attn_implementation(attention)
    model.model.vision_tower.requires_grad_(False)

    output = model(**batch)
    assert_parity(output.logits[0, ::4], golden["logits"])
    assert_parity(output.loss, golden["loss"])

    model.train()(**batch).loss.backward()
    parameters = dict(model.named_parameters())
    assert all(parameter.grad is None for name, parameter in parameters.items() if "vision_tower" in name)
    embedding = model.get_input_embeddings().weight.grad
    assert_parity(embedding[golden["embedding_rows"]], golden["embedding_gradients"])
    gradients = {"projector": {}, "llm_backbone": {}}
    for name, tensor in golden.items():
        if name.startswith("gradients/"):
            part, rest = name.removeprefix("gradients/").split(".", 1)
            gradients[part][rest] = tensor
    expected, unused = convert_original_tensors(gradients, model.config)
    assert len(expected) == 6 and not unused
    for name, gradient in expected.items():
        assert_parity(parameters[name].grad, gradient)


def test_unknown_tensors_are_named():
    config = make_config()
    with pytest.raises(ValueError, match="projector.fc3.weight"):
        convert_original_tensors({"projector": {"fc3.weight": torch.zeros(1)}}, config)
    with pytest.raises(ValueError, match="audio_backbone"):
        convert_original_tensors({"audio_backbone": {}}, config)
    checkpoint = torch.load(ASSETS / "checkpoint" / "checkpoints" / "latest-checkpoint.pt", weights_only=True)
    state, unused = convert_original_tensors(checkpoint["model"], config)
    assert "llm_backbone.llm.lm_head.weight" in unused
    assert "vision_backbone.featurizer.norm.weight" in unused
    assert all(".blocks.3." in n or "attn_pool" in n or "norm." in n or "lm_head" in n for n in unused)
