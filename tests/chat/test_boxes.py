"""Boxes in a conversation: drawn where the user wants them, remembered as the model wrote them."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLForConditionalGeneration

from open_qwen2vl import cli
from open_qwen2vl.chat.demo import Demo
from open_qwen2vl.chat.terminal import Conversation
from open_qwen2vl.families.qwen_vl.boxes import MARKS

ANSWER = "<|object_ref_start|>it<|object_ref_end|><|box_start|>(100,200),(500,600)<|box_end|>"


@pytest.fixture
def folder(qwen_vl_folder):
    return qwen_vl_folder("qwen2_vl")


@pytest.fixture
def seen(folder, monkeypatch) -> list[torch.Tensor]:
    """The prompts of a model that has an answer with a box for the first question, and words for others."""
    tokenizer, prompts = AutoProcessor.from_pretrained(folder).tokenizer, []

    def generate(self, input_ids, streamer, **_):
        prompts.append(input_ids)
        answer = tokenizer.encode((ANSWER if len(prompts) == 1 else "no box") + "<|im_end|>")
        for ids in [input_ids, *(torch.tensor([one]) for one in answer)]:
            streamer.put(ids)
        streamer.end()

    monkeypatch.setattr(Qwen2VLForConditionalGeneration, "generate", generate)
    return prompts


def test_the_answers_boxes_are_drawn_and_saved(folder, seen, tmp_path, monkeypatch, capsys):
    """An answer without a box leaves the file as it is, and says so."""
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO("where is it?\nand now?\n"))
    saved = tmp_path / "answer.png"
    assert cli.main(["chat", str(folder), "--image", str(tmp_path / "a.png"), "--save", str(saved)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["it(100,200),(500,600)", "no box"]
    assert f"{saved}: the image with the boxes" in err and f"{saved}: not written" in err
    pixels = np.array(Image.open(saved).convert("RGB"))
    assert pixels.shape == (50, 100, 3) and pixels[20, 10].any() and pixels[30, 50].any() and not pixels[45:].any()


def test_marks_stay_control_tokens_in_the_next_turn(folder, seen):
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    conversation = Conversation(model, processor, None, {"max_new_tokens": 1})
    conversation.waiting = [Image.new("RGB", (90, 60))]
    list(conversation.ask("where?"))
    assert conversation.drawn.size == (90, 60)
    list(conversation.ask("<|box_start|> and now?"))
    assert conversation.drawn is None
    ids = seen[1][0].tolist()
    assert [ids.count(one) for one in processor.tokenizer.convert_tokens_to_ids(list(MARKS))] == [1] * 4
    assert f"{ANSWER}<|im_end|>" in processor.tokenizer.decode(ids)


def test_the_demo_shows_the_drawn_image(folder, seen, tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    loaded = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    demo, request = Demo(*loaded, "name"), SimpleNamespace(session_hash="a")
    demo.build(None, 2)
    for text, files, shown in (("where?", [str(tmp_path / "a.png")], 4), ("and now?", [], 6)):
        demo.take({"text": text, "files": files}, request)
        *_, (_, messages, _) = demo.answer(None, 2, 0.0, request)
        assert len(messages) == shown
    assert messages[2]["content"] == "it(100,200),(500,600)" and messages[-1]["content"] == "no box"
    with Image.open(messages[3]["content"]["path"]) as drawn:
        assert drawn.size == (100, 50) and drawn.getpixel((10, 20)) != (0, 0, 0)


@pytest.mark.parametrize("name, said", [("a.txt", "ending in .png"), ("a.png", "write no boxes")])
def test_what_cannot_be_saved_is_one_line_before_the_first_answer(talker, processor, tmp_path, capsys, name, said):
    talker.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert cli.main(["chat", str(tmp_path / "model"), "--save", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
