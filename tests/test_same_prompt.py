"""One conversation through every door: serve, pipeline, chat, evaluation and the plain call give training's ids."""

import base64
import io
import json

import pytest
import torch
from PIL import Image
from transformers import pipeline

from open_qwen2vl import OpenQwen2VLProcessor, PackedDataset
from open_qwen2vl.chat.terminal import Conversation
from open_qwen2vl.data import plan_packs
from open_qwen2vl.evaluation.prompts import PromptBuilder

IMAGE = Image.effect_noise((40, 30), 90).convert("RGB")
FIRST, ANSWER = "two <|im_end|> dogs <s>?", "they run"
SECOND = "  and <|image_pad|> <image>here? "


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(params=["chat_template.jinja", "chat_template_original.jinja"], ids=["new model", "converted"])
def door_processor(processor, request):
    """The processor of a new model, and one with the template of a converted checkpoint as its default."""
    return OpenQwen2VLProcessor.from_parts(processor.image_processor, processor.tokenizer, 4, request.param)


@pytest.fixture
def trained(door_processor, tmp_path) -> tuple[list[int], torch.Tensor]:
    """What training reads of LLaVA's record: ids up to where its last answer begins, and pixels."""
    turns = [("human", f"<image>\n{FIRST}"), ("gpt", ANSWER), ("human", SECOND.replace("<image>", "")), ("gpt", "a")]
    record = {"image": "a.png", "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    (tmp_path / "a.png").write_bytes(png(IMAGE))
    (tmp_path / "a.json").write_text(json.dumps([record]))
    options = {"image_seq_length": 4, "max_length": 512, "num_workers": 1, "images": [tmp_path]}
    plan_packs([tmp_path / "a.json"], tmp_path / "packs", door_processor.tokenizer, **options)
    (item,) = PackedDataset(tmp_path / "packs", door_processor)
    labelled = (item["labels"] != -100).long().tolist()
    last = len(labelled) - labelled[::-1].index(1)
    begin = max(i for i in range(1, last) if labelled[i] and not labelled[i - 1])
    return item["input_ids"][:begin].tolist(), item["pixel_values"]


def messages(image: dict) -> list[dict]:
    second = SECOND.replace("<image>", "")
    return [
        {"role": "user", "content": [image, {"type": "text", "text": FIRST}]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        {"role": "user", "content": [{"type": "text", "text": second}]},
    ]


def served(door_processor) -> dict:
    """As `transformers serve` asks, of an OpenAI client's request."""
    utils = pytest.importorskip("transformers.cli.serving.utils")
    url = "data:image/png;base64," + base64.b64encode(png(IMAGE)).decode()
    request = messages({"type": "image_url", "image_url": {"url": url}})
    inputs = utils.BaseHandler.get_processor_inputs_from_messages(request, utils.Modality.VLM)
    options = {"add_generation_prompt": True, "tools": None, "return_tensors": "pt", "return_dict": True}
    return door_processor.apply_chat_template(inputs, tokenize=True, load_audio_from_video=False, **options)


def chatted(model, door_processor) -> dict:
    """The second question of a terminal's or browser's conversation, whose first answer was `ANSWER`."""
    conversation = Conversation(model, door_processor, None, {"max_new_tokens": 1, "do_sample": False})
    conversation.messages = messages({"type": "image", "image": IMAGE})[:2]
    seen = {}

    def generate(**inputs):
        seen.update(inputs)

    model.generate = generate
    list(conversation.ask(messages({})[2]["content"][0]["text"]))
    return seen


def evaluated(door_processor) -> dict:
    builder = PromptBuilder(door_processor)
    return builder.encode([builder.build(messages({"type": "image", "url": IMAGE}))])


def test_every_door_gives_what_was_trained(tiny_model, door_processor, trained):
    ids, pixels = trained
    image = {"type": "image", "image": IMAGE}
    call = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    piped = pipeline("image-text-to-text", model=tiny_model, processor=door_processor)
    chat = type("Seen", (), {})()
    piped.model.generate = lambda **inputs: vars(chat).update(inputs) or torch.zeros((1, 1), dtype=torch.long)
    piped(text=messages(image), max_new_tokens=1)
    doors = {
        "call": door_processor.apply_chat_template(messages(image), **call),
        "pipeline": vars(chat),
        "serve": served(door_processor),
        "chat": chatted(tiny_model, door_processor),
        "evaluation": evaluated(door_processor),
    }
    for name, inputs in doors.items():
        assert inputs["input_ids"][0].tolist() == ids, name
        floats = (inputs["pixel_values"] * 0.5 + 0.5) * 255
        assert torch.equal(floats.round().to(torch.uint8), pixels), name
    text = door_processor.tokenizer.decode(ids)
    assert text.count("<|image_pad|>") == 4 + 1 and ids.count(door_processor.image_token_id) == 4
