"""The commands of docs/sft.md as they stand, on a tiny model and a few conversations."""

import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import datasets
import pytest
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from transformers import AutoModelForImageTextToText

from open_qwen2vl import PackedSFTConfig, cli
from tests.data.scoring.conftest import save_tiny_clip

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "sft.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
TINY = "--use_cpu --dataloader_num_workers 0 --gradient_accumulation_steps 1 --max_steps 2"


@pytest.fixture
def place(tmp_path, tiny_model, processor, monkeypatch):
    """A working folder with what the commands read; the tiny model's whole grid has 16 patches."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    tiny_model.save_pretrained(tmp_path / "runs/pretrain_2b/model")
    processor.save_pretrained(tmp_path / "runs/pretrain_2b/model")
    picture = Image.linear_gradient("L").convert("RGB")
    (tmp_path / "images").mkdir()
    for path in ("images/cat.png", "cat.png"):
        picture.save(tmp_path / path)
    turns = [{"from": "human", "value": "<image>\nwhat is shown?"}, {"from": "gpt", "value": "a cat on a mat"}]
    records = [{"id": str(number), "image": "cat.png", "conversations": turns} for number in range(6)]
    for name in ("conversations", "reference"):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    (tmp_path / "clip").mkdir()
    save_tiny_clip(tmp_path / "clip")
    prompt, answer = {"role": "user", "content": "\nwhat is shown?"}, {"role": "assistant", "content": "a cat"}
    lines = [{"messages": [prompt, answer], "images": ["cat.png"]}] * 4
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = datasets.Dataset.from_list([{"messages": [prompt, answer], "images": [picture]}] * 4)
    rows.to_parquet(tmp_path / "chats.parquet")
    other = {"role": "assistant", "content": "blue dogs"}
    row = {"prompt": [prompt], "chosen": [answer], "rejected": [other], "images": [picture]}
    datasets.Dataset.from_list([row] * 2).to_parquet(tmp_path / "preferences.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(command: str, monkeypatch, capsys) -> None:
    """A line of a shell block in this process, with the tiny model's sizes."""
    question, _, command = command.rpartition("|")
    words = shlex.split(command)
    if words[0] == "accelerate":
        args = launch_command_parser().parse_args(words[2:])
        script, arguments = args.training_script, args.training_script_args
        monkeypatch.setattr(sys, "argv", [script, *arguments, *TINY.split()])
        runpy.run_path(script, run_name="__main__")
        return
    if words[1] in ("score", "filter"):
        if "--pretrained" in words:
            start = words.index("--model")
            words[start + 1 : start + 4] = ["local-dir:clip", "--device", "cpu"]
        words += ["--num-workers", "1"] if words[1] == "score" else ["--threads", "1"]
    elif words[1] == "pack":
        words[words.index("729")] = "16"
        words += ["--max-length", "96", "--num-workers", "1"]
    else:
        monkeypatch.setattr(sys, "stdin", io.StringIO(shlex.split(question)[1] + "\n"))
        words += ["--max-new-tokens", "2"]
    assert cli.main(words[1:]) == 0


def test_all_blocks_in_order(place, monkeypatch, capsys):
    assert [kind for kind, _ in BLOCKS].count("python") == 3
    scope: dict = {}
    for kind, code in BLOCKS:
        if kind == "yaml":
            (place / "unpacked.yaml").write_text(code)
        elif kind == "python":
            code = re.sub(r'(Config\(\s*"[^"]+")', r"\1, use_cpu=True", code)
            exec(compile(code, "docs/sft.md", "exec"), scope)
        else:
            for command in code.replace("\\\n", "").splitlines():
                run_command(command, monkeypatch, capsys)
    for run in ("sft", "unpacked"):
        assert (place / "runs" / run / "model" / "model.safetensors").exists()
    for run in ("sft_lora", "sft_qlora"):
        assert (place / "runs" / run / "model" / "adapter_model.safetensors").exists()
    assert (place / "runs/python/adapter_model.safetensors").exists()
    assert AutoModelForImageTextToText.from_pretrained("runs/sft_merged").config.image_seq_length == 16


def test_what_the_text_names_exists():
    for name in re.findall(r"`(\w+\.yaml)`", DOCUMENT):
        assert (ROOT / "recipes" / name).exists(), name
    for path, section in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", DOCUMENT):
        text = (ROOT / "docs" / path).read_text(encoding="utf8")
        titles = [title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)]
        assert not section or section in titles, (path, section)
    for option in ("assistant_only_loss", "max_length", "packing", "padding_free", "train_projector"):
        assert f"`{option}" in DOCUMENT and option in PackedSFTConfig.__dataclass_fields__
