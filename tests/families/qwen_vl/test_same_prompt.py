"""A conversation with boxes through every door: chat and evaluation ask with the ids that were trained."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl import PackedDataset
from open_qwen2vl.chat.terminal import Conversation
from open_qwen2vl.data import plan_packs
from open_qwen2vl.evaluation.prompts import PromptBuilder
from open_qwen2vl.grounding import prompt_messages
from open_qwen2vl.processing.sample_error import SampleError
from tests.qwen_vl import FAMILIES

IMAGE = Image.effect_noise((200, 100), 90).convert("RGB")
BOX = {"type": "box", "label": "it", "box": [[20, 30, 60.5, 70], [1, 1, 2, 2]]}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def messages(image: dict) -> list[dict]:
    question = {
        "role": "user",
        "content": [image, text("what is at "), {"type": "box", "box": [0, 0, 9, 9]}, text("?")],
    }
    return [
        question,
        {"role": "assistant", "content": [text("see "), BOX]},
        {"role": "user", "content": [text("and?")]},
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_door_gives_what_was_trained(family, qwen_vl_folder, tmp_path):
    folder = qwen_vl_folder(family)
    processor = AutoProcessor.from_pretrained(folder)
    IMAGE.save(tmp_path / "a.png")
    answer = {"role": "assistant", "content": [text("!")]}
    record = {"messages": [*messages({"type": "image"}), answer], "images": ["a.png"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    options = {"images": [tmp_path], "max_length": 512, "num_workers": 1}
    plan_packs([tmp_path / "a.jsonl"], tmp_path / "packs", processor, **options)
    item = PackedDataset(tmp_path / "packs", processor)[0]
    end = item["input_ids"].tolist().index(processor.tokenizer.convert_tokens_to_ids("!"))
    trained = item["input_ids"][:end].tolist()

    builder = PromptBuilder(processor)
    evaluated = builder.encode([builder.build(messages({"type": "image", "url": IMAGE}))])
    conversation, seen = Conversation(AutoModelForImageTextToText.from_pretrained(folder), processor, None, {}), {}
    conversation.options = {"max_new_tokens": 1}
    conversation.messages = messages({"type": "image", "image": IMAGE})[:2]
    conversation.model.generate = lambda **inputs: seen.update(inputs)
    list(conversation.ask("and?"))
    call = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    called = processor.apply_chat_template(
        prompt_messages(messages({"type": "image", "image": IMAGE}), processor), sanitize_control_tokens=True, **call
    )
    for name, inputs in {"evaluation": evaluated, "chat": seen, "call": called}.items():
        assert inputs["input_ids"][0].tolist() == trained, name
        assert torch.equal(inputs["image_grid_thw"], item["image_grid_thw"]), name


def test_images_are_to_be_opened(qwen_vl_folder):
    processor = AutoProcessor.from_pretrained(qwen_vl_folder("qwen2_vl"))
    for image in ({"type": "image", "url": "a.png"}, {"type": "image", "image": "a.png"}):
        with pytest.raises(ValueError, match="opened images"):
            prompt_messages(messages(image), processor)


def test_a_family_without_boxes_refuses_them(processor):
    with pytest.raises(SampleError, match="no form for boxes"):
        prompt_messages(messages({"type": "image", "image": IMAGE}), processor)
