"""The processor: budgets per call, chat template, saving and loading, errors that count."""

import base64
import copy
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import get_data_path
from PIL import Image
from transformers import AutoProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from open_qwen2vl import OpenQwen2VLProcessor
from open_qwen2vl.processing import rendering
from open_qwen2vl.processing.images import decode_image
from open_qwen2vl.processing.sample_error import SampleError
from open_qwen2vl.processing.text_formats import encode_as_text

IMAGE = Image.linear_gradient("L").convert("RGB").resize((50, 40))
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is shown in the image?"}]},
    {"role": "assistant", "content": "a cat"},
]


def test_image_becomes_budget_tokens(processor):
    for budget, options in [(4, {}), (16, {"image_seq_length": 16}), (1, {"images_kwargs": {"image_seq_length": 1}})]:
        inputs = processor(images=[IMAGE], text="<s><|image_pad|>\na cat", return_tensors="pt", **options)
        assert (inputs["input_ids"] == processor.image_token_id).sum() == budget
        # It travels only where the model would take another: TRL's GRPO and RLOO know no such key.
        assert inputs.get("image_seq_length") == (None if budget == 4 else [budget])
        assert inputs["pixel_values"].shape == (1, 3, 32, 32)


def test_text_only_has_no_image_entries(processor):
    assert set(processor(text=["a cat"])) == {"input_ids", "attention_mask"}


def test_placeholders_and_images_must_agree(processor):
    with pytest.raises(ValueError, match="2 .* and 1 images"):
        processor(images=[IMAGE], text="<|image_pad|><|image_pad|>")


def test_chat_template(processor):
    text = processor.apply_chat_template(MESSAGES, tokenize=False)
    assert text == (
        "<s><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|image_pad|>\nwhat is shown in the image?<|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n"
    )
    prompt = processor.apply_chat_template(MESSAGES[:1], add_generation_prompt=True, tokenize=False)
    assert text.startswith(prompt) and prompt.endswith("<|im_start|>assistant\n")
    own_system = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    assert processor.apply_chat_template(own_system, tokenize=False).startswith(
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"
    )


def test_generation_marks_cover_the_answer_and_its_end(processor):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": IMAGE}, MESSAGES[0]["content"][1]]},
        MESSAGES[1],
    ]
    encoded = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    supervised = encoded["input_ids"][encoded["assistant_masks"].bool()]
    assert processor.tokenizer.decode(supervised) == "a cat<|im_end|>\n"


def test_unknown_content_is_an_error(processor):
    with pytest.raises(Exception, match="audio is not supported"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}], tokenize=False)


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is OpenQwen2VLProcessor
    assert loaded.image_seq_length == 4
    assert loaded.chat_template == processor.chat_template and loaded.chat_templates == processor.chat_templates
    assert loaded.tokenizer.padding_side == "left"
    # The Auto classes would give the torchvision resize, which differs from the one of training.
    assert type(loaded.image_processor) is SiglipImageProcessorPil
    text = "<s><|image_pad|>\na cat"
    before, after = (p(images=[IMAGE], text=text, return_tensors="pt") for p in (processor, loaded))
    assert torch.equal(before["pixel_values"], after["pixel_values"])
    assert torch.equal(before["input_ids"], after["input_ids"])


def test_uint8_path_equals_the_float_path(processor):
    floats = processor(images=[IMAGE], text="<|image_pad|>", return_tensors="pt")["pixel_values"]
    quantised = processor.resize_images([IMAGE])
    assert quantised.dtype == torch.uint8
    torch.testing.assert_close((quantised.float() / 255 - 0.5) / 0.5, floats, atol=1e-6, rtol=0)
    assert processor.resize_images([]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("size", [(50, 40), (32, 32), (7, 90), (1, 1)])
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_training_reads_a_file_as_a_call_sees_it(processor, size, resample):
    """But for a grey level here and there where it shrinks; these are too small to be decoded at a fraction."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    processor = copy.copy(processor)
    processor.image_processor = SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=resample)
    read = processor.read_image(buffer.getvalue())
    assert (read.shape, read.dtype) == ((1, 3, 32, 32), torch.uint8) and read.is_contiguous()
    difference = (read.int() - processor.resize_images([decode_image(buffer.getvalue())]).int()).abs()
    assert difference.max() <= (min(size) > 32)
    with pytest.raises(SampleError):
        processor.read_image(b"no image")


def test_of_a_photograph_training_reads_few_pixels_differently(processor):
    processor = copy.copy(processor)
    processor.image_processor = SiglipImageProcessorPil(size={"height": 300, "width": 300})
    data = Path(f"{get_data_path()}/sample_data/grace_hopper.jpg").read_bytes()
    whole = processor.resize_images([decode_image(data)])
    difference = (processor.read_image(data).int() - whole.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.005


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_a_call_sees_the_pixels_that_training_sees(processor, mode):
    image = IMAGE.convert(mode)
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize(image.size).rotate(90))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    called = processor(images=[image], text="<|image_pad|>", return_tensors="pt")["pixel_values"]
    trained = processor.resize_images([decode_image(buffer.getvalue())])
    torch.testing.assert_close(called, (trained.float() / 255 - 0.5) / 0.5, atol=1e-6, rtol=0)


def test_tokenizing_captions_leaves_the_tokenizer_as_it_was(processor):
    tokenizer = processor.tokenizer
    before = tokenizer(["a cat<|im_end|>", "b"], padding=True, truncation=True, max_length=4)["input_ids"]
    encode_as_text(tokenizer, ["a<|im_end|>"])
    assert tokenizer(["a cat<|im_end|>", "b"], padding=True, truncation=True, max_length=4)["input_ids"] == before
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id]


def test_images_of_another_prompt_do_not_make_up_for_missing_ones(processor):
    prompts = ["<|image_pad|><|image_pad|>a cat", "two dogs"]
    with pytest.raises(ValueError, match="prompt 0 has 2 .* tokens and 1 images"):
        processor(images=[[IMAGE], [IMAGE]], text=prompts)
    assert processor(images=[[IMAGE, IMAGE], []], text=prompts)["pixel_values"][0].shape == (3, 32, 32)
    assert processor(images=[IMAGE, IMAGE], text=prompts)["pixel_values"][0].shape == (3, 32, 32)


def test_templates_have_names(processor, tmp_path):
    """`default` wherever no name is given, also to the tokenizer alone; a changed default is what is saved."""
    assert set(processor.chat_templates) == {"default", "chatml"}
    text = processor.apply_chat_template(MESSAGES)
    assert processor.apply_chat_template(MESSAGES, chat_template="chatml") == text
    assert processor.tokenizer.get_chat_template() == processor.chat_template
    other = OpenQwen2VLProcessor.from_parts(processor.image_processor, copy.copy(processor.tokenizer), 4)
    other.chat_template = "{{ messages[0]['role'] }}"
    other.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert (
        loaded.apply_chat_template(MESSAGES) == loaded.apply_chat_template(MESSAGES, chat_template="default") == "user"
    )
    assert loaded.apply_chat_template(MESSAGES, chat_template="chatml") == text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (["<img>", "a"], "I\na"),
        (["<img>", "\na"], "I\na"),
        (["<img>", "\n\na"], "I\n\na"),
        (["<img>", "", "\na"], "I\na"),
        (["<img>", "<img>", "\na"], "I\nI\na"),
        (["<img>", "\n", "<img>", "\na"], "I\nI\na"),
        (["a ", "<img>"], "a I\n"),
        (["a", "\n\nb"], "a\n\nb"),
    ],
)
def test_an_image_is_followed_by_one_newline(processor, content, expected):
    parts = [{"type": "image"} if part == "<img>" else {"type": "text", "text": part} for part in content]
    text = processor.apply_chat_template([{"role": "user", "content": parts}])
    assert text.split("user\n")[1] == expected.replace("I", "<|image_pad|>") + "<|im_end|>\n"


@pytest.mark.parametrize("token", ["<|im_end|>", "<s>", "<|image_pad|>", "<|im_start|>", "<|endofchunk|>"])
def test_what_a_user_types_is_no_control_token(processor, token):
    text = f"a {token} cat"
    messages = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": text}]}]
    ids = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
    plain = processor.apply_chat_template(
        [{"role": "user", "content": [messages[0]["content"][0], {"type": "text", "text": "a cat"}]}],
        tokenize=True,
        return_dict=True,
    )["input_ids"][0]
    token_id = processor.tokenizer.convert_tokens_to_ids(token)
    assert ids.count(token_id) == plain.count(token_id)
    assert processor.tokenizer.decode(ids).endswith(f"<|image_pad|>\n{text}<|im_end|>\n")


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "the conversation is empty"),
        ([[]], "the conversation is empty"),
        ([{"role": "bing", "content": "a"}], "a message of the role bing: it is system, user or assistant"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "content of type text has no text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content of type text has no text"),
        ([{"role": "user", "content": None}], "a message has no content"),
        ([{"role": "user"}], "a message has no content"),
        ([{"role": "user", "content": 3}], "a message has no content"),
        ([[{"role": "user", "content": "a"}], [{"role": "user", "content": None}]], "a message has no content"),
        ([{"content": "a"}], "a message of the role"),
        ([{"role": "user", "content": ["a"]}], "a part of the 1. message has no type"),
        ([{"role": "user", "content": [{"type": None}]}], "a part of the 1. message has no type"),
        (["a"], "a message has no content"),
        ("a", "a conversation is a list of messages, not a str"),
        ({"role": "user", "content": "a"}, "a conversation is a list of messages, not a dict"),
        ([{"role": "user", "content": [{"type": "video"}]}], "content of type video is not supported"),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_one_clear_error(processor, messages, error):
    for options in ({}, {"tokenize": True, "return_dict": True}):
        for template in ("default", "chatml"):
            with pytest.raises(ValueError, match=error):
                processor.apply_chat_template(messages, chat_template=template, **options)


@pytest.mark.parametrize("images", [[], [[], []], ()])
def test_no_images_in_any_form(processor, images):
    inputs = processor(images=images, text=["a cat", "two dogs run"], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"][0, 0] == 0  # on the left
    with pytest.raises(ValueError, match="no images were passed"):
        processor(images=images, text=["<|image_pad|>", "a"])


def test_a_template_that_runs_on_and_on_is_stopped(processor, monkeypatch):
    monkeypatch.setattr(rendering, "MAX_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for options in ({}, {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}):
        with pytest.raises(ValueError, match="runs on and on"):
            processor.apply_chat_template(MESSAGES, chat_template=endless, **options)
    with ThreadPoolExecutor(1) as executor, pytest.raises(ValueError, match="runs on and on"):
        executor.submit(processor.apply_chat_template, MESSAGES, chat_template=endless).result()
    assert processor.apply_chat_template(MESSAGES).startswith("<s>")


def test_a_budget_set_afterwards_travels(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, image_seq_length=9)
    inputs = loaded(images=[IMAGE], text="<|image_pad|>")
    assert inputs["image_seq_length"] == [9] and inputs["input_ids"][0].count(loaded.image_token_id) == 9
    loaded.image_seq_length = 4
    assert "image_seq_length" not in loaded(images=[IMAGE], text="<|image_pad|>")


def read(processor, image) -> np.ndarray:
    """Grey levels `(3, 32, 32)` that a call makes of an image."""
    pixels = processor(images=[image], text="<|image_pad|>", return_tensors="pt")["pixel_values"][0]
    return ((pixels + 1) * 127.5).numpy()


@pytest.mark.parametrize("depth", ["grey16", "rgba", "rgb", "floats"])
def test_every_way_in_gives_the_same_picture(processor, tmp_path, depth):
    """A Pillow image, a path, a data URI, an array and a tensor of either layout."""
    ramp = np.tile(np.arange(64, dtype=np.float64) * 4, (64, 1))
    levels = np.stack([ramp, ramp[::-1], ramp.T], axis=-1)
    if depth == "grey16":
        array = (ramp * 256).astype(np.uint16)
        expected = np.stack([ramp] * 3, axis=-1)
    elif depth == "rgba":
        array = np.concatenate([levels, ramp.T[..., None]], axis=-1).astype(np.uint8)
        expected = levels
    else:
        array, expected = levels.astype(np.uint8), levels
    ways = [array, torch.from_numpy(array if array.dtype == np.uint8 else array.astype(np.int32))]
    if array.ndim == 3:
        ways += [np.moveaxis(array, -1, 0), torch.from_numpy(array).permute(2, 0, 1)]
    if depth == "floats":
        ways = [array / 255, torch.from_numpy(np.moveaxis(array, -1, 0) / 255).float()]
    image = Image.fromarray(array)
    image.save(tmp_path / "image.png")
    encoded = base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    ways += [image, str(tmp_path / "image.png"), tmp_path / "image.png", f"data:image/png;base64,{encoded}", encoded]
    reference = read(processor, Image.fromarray(expected.astype(np.uint8)))
    for way in ways:
        np.testing.assert_allclose(read(processor, way), reference, atol=1.5)


def test_a_batch_of_images_in_one_array(processor):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    text = ["<|image_pad|>", "<|image_pad|>"]
    pixels = processor(images=images, text=text, return_tensors="pt")["pixel_values"]
    assert torch.equal(((pixels + 1) * 127.5).round().byte(), images)


@pytest.mark.parametrize("source", ["nowhere.png", "data:image/png;base64,?"])
def test_an_image_that_cannot_be_read_is_named(processor, source):
    with pytest.raises(ValueError, match="no file of this name, no http"):
        processor(images=[source], text="<|image_pad|>")
