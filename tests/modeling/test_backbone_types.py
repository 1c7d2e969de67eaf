"""Every language model and vision tower that a model can be made of: packed equals alone, and saved equals loaded."""

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from open_qwen2vl import OpenQwen2VLConfig, OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor
from open_qwen2vl.modeling.configuration_open_qwen2vl import TEXT_TYPES, VISION_TYPES
from open_qwen2vl.processing.text_formats import encode_as_text
from tests import tiny_backbones
from tests.conftest import make_tokenizer
from tests.modeling.packs import forward_inputs, join, make_document
from tests.tiny_backbones import REGISTERED, WINDOWED, pairs, with_own_start

CAPTIONS = ["a cat", "two dogs run in the park", "blue and green squares, red circles on a mat"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


PLAIN = {"llama": ["<|image_pad|>", "<|im_start|>", "<|im_end|>", "<s>"], "gemma": ["<|image_pad|>"]}


@pytest.mark.parametrize(("kind", "missing"), PLAIN.items())
def test_missing_tokens_get_ids_and_rows(backbone_folder, kind, missing, tmp_path):
    """A vocabulary of another family, which begins every text with a token of its own and has none for padding."""
    state = make_tokenizer().backend_tokenizer.to_str()
    for number, token in enumerate(missing):
        state = state.replace(f'"{token}"', f'"<other {number}>"')
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state), eos_token="<|endoftext|>")
    with_own_start(tokenizer, "<|endoftext|>")
    assert tokenizer.encode("a") == [0, *tokenizer.encode("a", add_special_tokens=False)]
    text = tiny_backbones.save_text(tmp_path / "text", kind, tokenizer)
    pair = (backbone_folder("siglip_vision_model"), text)
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(*pair, image_seq_length=4)
    processor = OpenQwen2VLProcessor.from_vision_text_pretrained(*pair, image_seq_length=4)
    added = [*missing[:3], "<|endofchunk|>", *missing[3:]]
    ids = processor.tokenizer.convert_tokens_to_ids(added)
    assert ids == list(range(len(tokenizer), len(tokenizer) + len(added)))
    assert model.config.text_config.vocab_size == ids[-1] + 1
    assert model.config.image_token_id == processor.image_token_id == ids[0]
    assert model.generation_config.eos_token_id == [0, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    processor.save_pretrained(tmp_path / "both")
    for own in (processor, AutoProcessor.from_pretrained(tmp_path / "both")):
        prompt = own.tokenizer.encode("<s><|image_pad|>\na cat")
        assert prompt[:2] == own.tokenizer.convert_tokens_to_ids(["<s>", "<|image_pad|>"])
        assert prompt[2:] == encode_as_text(own.tokenizer, ["\na cat"])[0]
        assert own.tokenizer.pad_token == "<|endoftext|>" and own.tokenizer.decode(prompt[2:]) == "\na cat"
    document = make_document(processor.tokenizer, "a cat", 0)
    assert model(**forward_inputs([join([document])])).loss.isfinite()


def test_a_tokenizer_that_writes_otherwise_behind_tokens_is_refused(backbone_folder, tmp_path):
    """Llama 2's and Mistral's put a space before a text's first word and none behind a token."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a"])}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[("\u2581", "a")])
    text = tiny_backbones.save_text(tmp_path, "llama", tokenizer)
    with pytest.raises(ValueError, match="encodes a text behind a token in another way than alone"):
        OpenQwen2VLProcessor.from_vision_text_pretrained(backbone_folder("clip_vision_model"), text)


REFUSED = {
    "gemma2": (None, "'gemma2' cannot be the language model"),
    "phi3": (None, "'phi3' cannot be the language model"),
    "gemma3_text": ({"final_logit_softcapping": 30.0}, "with final_logit_softcapping is not supported"),
    "vit": (None, "'vit' cannot be the vision tower"),
    "dinov3_convnext": (None, "'dinov3_convnext' cannot be the vision tower"),
}


@pytest.mark.parametrize(("kind", "options", "message"), [(kind, *rest) for kind, rest in REFUSED.items()])
def test_what_cannot_work_is_refused_by_its_name(backbone_folder, kind, options, message, tmp_path):
    config = AutoConfig.for_model(kind, **options or {})
    config.save_pretrained(tmp_path)
    is_text = "language" in message or "logit" in message
    pair = (
        (backbone_folder("clip_vision_model"), str(tmp_path)) if is_text else (str(tmp_path), backbone_folder("llama"))
    )
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{message}"):
        OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(*pair)
    with pytest.raises(ValueError, match=message):
        OpenQwen2VLConfig(**{"text_config" if is_text else "vision_config": config})


def test_every_type_is_tried():
    assert (tuple(tiny_backbones.VISION), tuple(tiny_backbones.TEXT)) == (VISION_TYPES, TEXT_TYPES)


def build(backbone_folder, vision: str, text: str, **options):
    torch.manual_seed(0)
    pair = (backbone_folder(vision), backbone_folder(text))
    return (
        OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(*pair, image_seq_length=4, **options),
        OpenQwen2VLProcessor.from_vision_text_pretrained(*pair, image_seq_length=4),
    )


@pytest.mark.parametrize(("vision", "text"), pairs(WINDOWED, REGISTERED))
def test_packed_equals_alone(backbone_folder, vision, text):
    model, processor = build(backbone_folder, vision, text)
    documents = [make_document(processor.tokenizer, caption, seed) for seed, caption in enumerate(CAPTIONS)]
    labels = sum(int((document["labels"][1:] != -100).sum()) for document in documents)
    model.train()  # where nothing may be left to chance
    for attention in ("eager", "sdpa", "packed_varlen"):
        model.set_attn_implementation(attention)
        loss, logits = 0.0, []
        for document in documents:
            inputs = {name: document[name][None] for name in ("input_ids", "labels")}
            options = {"num_items_in_batch": labels, "skip_logits": False, "pixel_values": document["pixel_values"]}
            output = model(**inputs, **options)
            loss, logits = loss + output.loss, [*logits, output.logits[0]]
        loss.backward()
        alone = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        packed = model(**forward_inputs([join(documents)]), skip_logits=False)
        packed.loss.backward()
        torch.testing.assert_close(packed.loss, loss, **TOLERANCE)
        torch.testing.assert_close(packed.logits[0], torch.cat(logits), **TOLERANCE)
        for name, parameter in model.named_parameters():
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(parameter.grad, alone[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        model.zero_grad()


@pytest.mark.parametrize("kind", VISION_TYPES[:-1])
def test_the_tower_is_the_hubs(backbone_folder, kind):
    """Its features of the second last layer, of pixels with its own size, mean, deviation and filter."""
    model, processor = build(backbone_folder, kind, "qwen2")
    tower = AutoModel.from_pretrained(backbone_folder(kind))
    tower = getattr(tower, "vision_model", tower).eval()
    own = tiny_backbones.VISION[kind][1]
    used = processor.image_processor
    assert used.size == {"height": 32, "width": 32} and used.resample == own.resample
    for values in (used, model.config):
        assert [list(values.image_mean), list(values.image_std)] == [list(own.image_mean), list(own.image_std)]
    image = Image.effect_noise((32, 32), 90).convert("RGB")
    pixels = processor(images=image, text="<|image_pad|>", return_tensors="pt")["pixel_values"]
    # A square of the tower's size: nothing to resize or to crop, which its own processor would do.
    options = {"do_resize": False, "do_center_crop": False} if kind.startswith("dinov2") else {}
    torch.testing.assert_close(pixels, own(images=image, return_tensors="pt", **options)["pixel_values"])
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states[-2][:, -16:]
        raw = model.get_image_features(processor.resize_images([image]), image_seq_length=16)
        assert torch.allclose(raw.last_hidden_state[:, -16:], expected, atol=1e-5)
        projected = model.model.multi_modal_projector(expected, 16)
    torch.testing.assert_close(raw.pooler_output[0], projected[0])


@pytest.mark.parametrize(("vision", "text"), pairs(WINDOWED, REGISTERED))
def test_saved_equals_loaded(backbone_folder, vision, text, tmp_path):
    model, processor = build(backbone_folder, vision, text)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    loaded, again = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    images = [Image.linear_gradient("L"), Image.effect_noise((40, 30), 90)]
    texts = ["<s><|image_pad|>\na photo", "<s><|image_pad|>"]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    assert torch.equal(
        again(images=images, text=texts, return_tensors="pt", padding=True)["input_ids"], inputs["input_ids"]
    )
    assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    answers = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(answers, loaded.generate(**inputs, max_new_tokens=4))
    # Padding, on the left, changes no answer; a cache neither.
    alone = processor(images=images[1:], text=texts[1:], return_tensors="pt")
    expected = model.generate(**alone, max_new_tokens=4, use_cache=False)[0, alone["input_ids"].shape[1] :]
    assert torch.equal(answers[1, inputs["input_ids"].shape[1] :][: len(expected)], expected)
