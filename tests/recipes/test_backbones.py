"""Plan, training, resume, estimate and an answer on other backbones than the paper's, as a user runs them."""

import json
import re
import runpy
import shutil
import sys

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl import OpenQwen2VLProcessor, cli
from tests.recipes.test_pretrain import RECIPES, write_tar

PAGE = RECIPES.parent / "docs" / "backbones.md"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "text"),
    [("siglip2_vision_model", "llama"), ("dinov3_vit", "gemma3_text"), ("clip_vision_model", "qwen3")],
)
def test_a_pair_trains_and_answers(vision, text, backbone_folder, tmp_path, monkeypatch, capsys):
    folders = backbone_folder(vision), backbone_folder(text)
    write_tar(tmp_path / "0.tar", 40, seed=0)
    OpenQwen2VLProcessor.from_vision_text_pretrained(*folders, image_seq_length=9).save_pretrained(tmp_path / "both")
    # The page's command for native resolution; without it the tokenizer is enough.
    (command,) = re.findall(r"```bash\nopen-qwen2vl (pack .*)\n```", PAGE.read_text(encoding="utf8"))
    places = {"shards/": tmp_path, "naflex": tmp_path / "both", "256": 9, "packs/": tmp_path / "packs"}
    words = [str(places.get(word, word)) for word in command.split()]
    if not vision.startswith("siglip2"):
        at = words.index("--processor")
        words[at : at + 2] = ["--tokenizer", folders[1]]
    assert cli.main([*words, "--max-length", "64", "--num-workers", "1"]) == 0
    options = {
        "vision_model": folders[0],
        "text_model": folders[1],
        "image_seq_length": 9,
        "train_packs": str(tmp_path / "packs"),
        "per_device_train_batch_size": 2,
        "train_vision_tower": True,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 3e-3,
        "dataloader_num_workers": 1,
        "use_cpu": True,
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(options))

    def train() -> list[float]:
        monkeypatch.setattr(sys, "argv", ["pretrain.py", str(config), "--output_dir", str(run)])
        runpy.run_path(str(RECIPES / "pretrain.py"), run_name="__main__")
        history = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
        return [log["loss"] for log in history if "loss" in log]

    run = tmp_path / "run"
    losses = train()
    assert len(losses) == 6 and losses[-1] < losses[0]
    # As after a kill in step 4.
    shutil.rmtree(run / "checkpoint-6")
    shutil.rmtree(run / "model")
    assert train() == losses
    assert cli.main(["estimate", str(config), "--gpu", "h100", "--mfu", "0.3"]) == 0
    assert "hours" in capsys.readouterr().out
    model = AutoModelForImageTextToText.from_pretrained(run / "model").eval()
    processor = AutoProcessor.from_pretrained(run / "model")
    inputs = processor(images=Image.new("RGB", (90, 40)), text="<s><|image_pad|>\n", return_tensors="pt")
    with torch.no_grad():
        assert model.generate(**inputs, max_new_tokens=3).shape[1] <= inputs["input_ids"].shape[1] + 3
