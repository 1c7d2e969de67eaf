"""A converted checkpoint is fine-tuned: packed with its own processor, trained, and trained on in the plain format."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl import PackedDataset, PackedSFTConfig, PackedSFTTrainer
from open_qwen2vl.cli import main
from open_qwen2vl.conversion.convert import convert_checkpoint

ASSETS = Path(__file__).parents[1] / "assets" / "original"
QUIET = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "model"
    convert_checkpoint(ASSETS / "checkpoint", folder, str(ASSETS / "Qwen2.5-tiny"))
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Eight conversations about a picture."""
    folder = tmp_path_factory.mktemp("records")
    Image.linear_gradient("L").save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "a cat"}]
    lines = [json.dumps({"image": "a.png", "conversations": turns})] * 8
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("name", [None, pytest.param("default", marks=pytest.mark.slow), "chatml"])
def test_a_converted_checkpoint_is_packed_and_trained(converted, records, tmp_path, name):
    command = ["pack", str(records / "chats.jsonl"), "--images", str(records), "--tokenizer", str(converted)]
    command += ["--output", str(tmp_path / "packs"), "--image-seq-length", "16", "--max-length", "256"]
    assert main([*command, *(["--chat-template", name] if name else [])]) == 0
    processor = AutoProcessor.from_pretrained(converted)
    packs = PackedDataset(tmp_path / "packs", processor)
    ids = packs[0]["input_ids"]
    # The text that was planned is the one that the processor writes under this name, the original's quirks included.
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat is shown?"}]}]
    messages.append({"role": "assistant", "content": "a cat"})
    text = processor.apply_chat_template(messages, **({"chat_template": name} if name else {}))
    assert ("<|im_end|>assistant\n" in text) == (name != "chatml")
    expected = text.replace("<|image_pad|>", "<|image_pad|>" * 16)
    assert processor.tokenizer.decode(ids).startswith(expected)
    model = AutoModelForImageTextToText.from_pretrained(converted)
    before = model.lm_head.weight.detach().clone()
    args = PackedSFTConfig(str(tmp_path / "run"), max_steps=1, learning_rate=1e-3, **QUIET)
    trainer = PackedSFTTrainer(model, args, packs, None, processor)
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, before)
