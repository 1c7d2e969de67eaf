"""SigLIP 2 NaFlex: images keep their shape, and take patches and tokens by it, from the plan to the model's answer."""

import io

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor
from open_qwen2vl.families import document_processor, packed_model
from open_qwen2vl.families.interface import Media, StepWork, VisionWork
from open_qwen2vl.families.open_qwen2vl_memory import vision_tower_kept
from open_qwen2vl.processing.sample_error import SampleError
from open_qwen2vl.processing.text_formats import text_document
from open_qwen2vl.processing.tower_pixels import image_shape
from tests.estimate.test_memory import kept_bytes
from tests.modeling.packs import forward_inputs, join

KIND = "siglip2_vision_model"
SIZES = [(64, 40), (20, 90), (33, 33)]
CAPTIONS = ["a cat", "two dogs run in the park", "blue and green squares"]
BUDGET = 10


@pytest.fixture(scope="module")
def folders(backbone_folder):
    return backbone_folder(KIND), backbone_folder("llama")


@pytest.fixture
def model(folders):
    torch.manual_seed(0)
    return OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(*folders, image_seq_length=BUDGET)


@pytest.fixture(scope="module")
def processor(folders):
    return OpenQwen2VLProcessor.from_vision_text_pretrained(*folders, image_seq_length=BUDGET)


@pytest.fixture(scope="module")
def images():
    return [Image.effect_noise(size, 90).convert("RGB") for size in SIZES]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def documents(processor, images):
    """Items of a data set, each one caption and one image of its own shape."""
    family, items = document_processor(processor), []
    for image, caption in zip(images, CAPTIONS, strict=True):
        media = Media("image", *image.size)
        block = family.placeholder_ids(media)
        ids, labels = text_document([None, caption], [block], processor.tokenizer, family.text_format)
        ids, tensors = torch.from_numpy(ids), family.read_media(png(image), media)
        places = torch.nonzero(ids == processor.image_token_id).squeeze(1)
        text = {"input_ids": ids, "labels": torch.from_numpy(labels), "position_ids": torch.arange(len(ids))}
        items.append({**text, **tensors, "image_seq_length": BUDGET, "placeholders": {"image_positions": places}})
    return items


def test_tokens_keep_the_shape_within_the_budget(processor):
    image_processor = processor.image_processor
    for size in [*SIZES, (8, 8), (1000, 1000), (5000, 8), (8, 5000), (300, 100)]:
        for most in (1, 2, 10, 23, 24, 100):
            high, wide, rows, columns = image_shape(image_processor, *size, most)
            assert high * wide <= 24 and 1 <= rows <= high and 1 <= columns <= wide and rows * columns <= most
            assert most < high * wide or (rows, columns) == (high, wide)
    assert image_shape(image_processor, 100, 100, 9) == [4, 4, 3, 3]
    assert image_shape(image_processor, 100, 300, 100) == [3, 8, 3, 8]


@pytest.mark.parametrize("attention", ["eager", "sdpa", "packed_varlen"])
def test_packed_equals_alone(model, documents, attention):
    model.set_attn_implementation(attention)
    model.train()
    labels = sum(int((document["labels"][1:] != -100).sum()) for document in documents)
    names = ("input_ids", "labels")
    loss, logits = 0.0, []
    for document in documents:
        pixels = {name: document[name] for name in ("pixel_values", "image_shapes")}
        own = {name: document[name][None] for name in names}
        output = model(**own, **pixels, num_items_in_batch=labels, skip_logits=False)
        loss, logits = loss + output.loss, [*logits, output.logits[0]]
    loss.backward()
    alone = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    joined = join(documents) | {"image_shapes": torch.cat([document["image_shapes"] for document in documents])}
    packed = model(**forward_inputs([joined | {"on_host": ("image_shapes",)}]), skip_logits=False)
    packed.loss.backward()
    tolerance = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(packed.loss, loss, **tolerance)
    torch.testing.assert_close(packed.logits[0], torch.cat(logits), **tolerance)
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, alone[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_training_sees_what_the_processor_gives(model, processor, images, documents):
    """The ids, the shapes and, normalised by the model, the pixels."""
    for image, caption, document in zip(images, CAPTIONS, documents, strict=True):
        inputs = processor(images=image, text=f"<s><|image_pad|>\n{caption}<|im_end|>", return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == document["input_ids"].tolist()
        assert inputs["image_shapes"].tolist() == document["image_shapes"].tolist()
        own = model(document["input_ids"][None], document["pixel_values"], image_shapes=document["image_shapes"])
        torch.testing.assert_close(model(**inputs).logits, own.logits, atol=1e-5, rtol=1e-5)


def test_the_tower_is_the_hubs(model, processor, folders, images):
    tower = AutoModel.from_pretrained(folders[0]).vision_model.eval()
    assert processor.image_processor.max_num_patches == 24
    stock = processor.image_processor(images, return_tensors="pt")
    with torch.no_grad():
        expected = tower(**stock, output_hidden_states=True).hidden_states[-2]
        inputs = processor(images=images, text="<|image_pad|>" * 3, image_seq_length=24, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], stock["pixel_values"])
        assert inputs["image_shapes"][:, :2].tolist() == stock["spatial_shapes"].tolist()
        found = model.get_image_features(inputs["pixel_values"], image_shapes=inputs["image_shapes"])
        for image, (high, wide) in enumerate(stock["spatial_shapes"].tolist()):
            own = expected[image, : high * wide]
            torch.testing.assert_close(found.last_hidden_state[image, : high * wide], own, atol=1e-5, rtol=1e-5)
            projected = model.model.multi_modal_projector(own[None], high * wide)[0]
            torch.testing.assert_close(found.pooler_output[image], projected, atol=1e-5, rtol=1e-5)


def test_saved_equals_loaded(model, processor, images, tmp_path):
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    loaded, again = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    texts = ["<s><|image_pad|><|image_pad|>\na photo", "<s><|image_pad|>"]
    options = {"images": [images[:2], images[2:]], "text": texts, "return_tensors": "pt", "padding": True}
    inputs = processor(**options)
    answers = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(answers, loaded.generate(**again(**options), max_new_tokens=4))
    numbers = again._get_num_multimodal_tokens(image_sizes=[size[::-1] for size in SIZES])["num_image_tokens"]
    assert sum(numbers) == (inputs["input_ids"] == processor.image_token_id).sum()


def test_a_batch_without_images_runs_the_tower_too(model, processor):
    ids = torch.tensor([processor.tokenizer.encode("<s>a cat")])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_does_not_fit_is_refused(model, processor, images, tiny_model):
    inputs = processor(images=images[0], text="<|image_pad|>", return_tensors="pt")
    pixels, shapes = inputs["pixel_values"], inputs["image_shapes"]
    with pytest.raises(ValueError, match="1 images of native resolution need as many image_shapes"):
        model(inputs["input_ids"], pixels)
    with pytest.raises(ValueError, match="image_shapes .* do not fit an image of 24 patches"):
        model(inputs["input_ids"], pixels, image_shapes=shapes + 9)
    with pytest.raises(ValueError, match="the tower takes 8x8 patches"):
        model(inputs["input_ids"], pixels[..., 1:], image_shapes=shapes)
    with pytest.raises(ValueError, match="image_shapes are for a vision tower of native resolution"):
        tiny_model.get_image_features(torch.zeros((1, 3, 32, 32)), image_shapes=shapes)
    with pytest.raises(ValueError, match="image_seq_length=0 must be"):
        processor(images=images[0], text="<|image_pad|>", image_seq_length=0)
    with pytest.raises(SampleError, match="it has 64x40 pixels, planned 65x40"):
        document_processor(processor).read_media(png(images[0]), Media("image", 65, 40))


def test_a_plan_of_other_patches_is_refused(processor):
    planned = document_processor(processor).fingerprint()
    assert planned == {"family": "open_qwen2vl", "image_seq_length": BUDGET, "patch_size": 8, "max_num_patches": 24}
    with pytest.raises(ValueError, match="max_num_patches 16, now 24"):
        document_processor(processor, planned | {"max_num_patches": 16})
    # Planned by a tokenizer alone, which knows of no image's shape.
    with pytest.raises(ValueError, match="patch_size None, now 8"):
        document_processor(processor, {"family": "open_qwen2vl", "image_seq_length": BUDGET})


def test_work_and_activations_are_those_of_the_patches(model, documents, processor):
    family, config, trained = (
        packed_model(model.config),
        model.config,
        dict.fromkeys(packed_model(model.config).parts, 0),
    )
    trained["language_model"] = 0
    own = document_processor(processor).vision_work(Media("image", 64, 40))
    high, wide, rows, columns = documents[0]["image_shapes"][0].tolist()
    assert own == VisionWork(high * wide, (high * wide) ** 2, rows * columns)
    flops = [family.step_flops(config, StepWork(9, 81, 1, VisionWork(p, p**2, 4)), trained) for p in (10, 11)]
    blocks = sum(parameter.numel() for parameter in model.model.vision_tower.encoder.parameters())
    assert flops[1] - flops[0] == 2 * blocks + 4 * 2 * 32 * (121 - 100)
    kept = vision_tower_kept(config, torch.float32, False)
    tower, shapes = model.model.vision_tower.train(), torch.tensor([[4, 4], [4, 4]])
    tower.set_attn_implementation("sdpa")
    real = kept_bytes(tower, lambda: tower(torch.randn(2, 16, 192), torch.ones(2, 16), shapes))
    assert kept.bytes(2) - kept.block * 2 == pytest.approx(real, rel=0.05)
