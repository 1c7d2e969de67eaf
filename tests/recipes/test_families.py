"""Both recipes on stock models of transformers: packs planned by their processor, all weights and LoRA."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from open_qwen2vl import cli
from tests.qwen_vl import save_qwen_vl
from tests.tars import write_caption_tar

RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = ["--use_cpu", "--max_steps", "2", "--dataloader_num_workers", "0", "--logging_steps", "1"]


def run(monkeypatch, script: str, *argv) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv), *QUICK])
    runpy.run_path(str(RECIPES / script), run_name="__main__")


@pytest.mark.parametrize(
    "family",
    ["qwen2_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.slow), pytest.param("qwen3_vl", marks=pytest.mark.slow)],
)
def test_captions_then_conversations(family, tmp_path, monkeypatch, capsys):
    model = save_qwen_vl(tmp_path / family, family)
    write_caption_tar(tmp_path / "0.tar", ["a cat", "two dogs run", "blue and green"] * 3, size=(60, 90))
    pack = ["--processor", str(model), "--max-length", "128", "--num-workers", "1"]
    assert cli.main(["pack", str(tmp_path / "0.tar"), "--output", str(tmp_path / "packs"), *pack]) == 0
    start = ["--model_name_or_path", model, "--train_packs", tmp_path / "packs"]
    run(monkeypatch, "pretrain.py", *start, "--output_dir", tmp_path / "run")
    results = json.loads((tmp_path / "run/train_results.json").read_text())
    assert results["steps"] == 2 and results["images"] == results["documents"] > 0
    assert json.loads((tmp_path / "run/model/config.json").read_text())["model_type"] == family
    card = (tmp_path / "run/model/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == [family] and "trust_remote_code" not in card

    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    turns = [{"role": "user", "content": "what is shown?"}, {"role": "assistant", "content": "a cat"}]
    turns[0]["content"] = [{"type": "image"}, {"type": "text", "text": "what is shown?"}]
    row = json.dumps({"messages": turns, "images": ["red.png"]})
    (tmp_path / "chats.jsonl").write_text(f"{row}\n" * 3)
    lora = ["--use_peft", "--lora_r", "2", "--bf16=false"]
    # A run's folder names its model, here as everywhere.
    start = ["--model_name_or_path", tmp_path / "run", "--dataset_name", tmp_path / "chats.jsonl"]
    run(monkeypatch, "sft.py", *start, *lora, "--output_dir", tmp_path / "tuned")
    adapter = json.loads((tmp_path / "tuned/model/adapter_config.json").read_text())
    assert adapter["modules_to_save"][0] == "merger"
    assert json.loads((tmp_path / "tuned/train_results.json").read_text())["images"] == 2

    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "sft.py", *start, "--image_seq_length", "4", "--output_dir", tmp_path / "no", "--bf16=false")
    assert stop.value.code == 2 and "remove image_seq_length: it is Open-Qwen2VL's" in capsys.readouterr().err
