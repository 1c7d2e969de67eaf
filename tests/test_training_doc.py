"""The commands of docs/training.md on tiny backbones; of those for GPUs or a cluster, that their options exist."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from open_qwen2vl import cli
from tests.tars import write_caption_tar

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "training.md").read_text(encoding="utf8")
ELSEWHERE = ("ddp_8gpu", "fsdp2_8gpu", "hsdp_multinode", "sbatch")
TINY = "--image_seq_length 4 --bf16=false --use_cpu --dataloader_num_workers 0 --gradient_accumulation_steps 2"


def commands(kind: str = "bash") -> list[list[str]]:
    """The commands of all code blocks, each as a list of words."""
    text = "".join(re.findall(rf"^```{kind}\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL))
    return [shlex.split(line) for line in text.replace("\\\n", "").splitlines()]


def runs_here(command: list[str]) -> bool:
    return not any(name in word for word in command for name in ELSEWHERE)


@pytest.fixture
def place(tmp_path, backbones, monkeypatch):
    """A working folder with what the commands read."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for folder in ("shards", "held-out"):
        (tmp_path / folder).mkdir()
        write_caption_tar(tmp_path / folder / "0.tar", ["a cat", "two dogs run", "blue and green"] * 8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(command: list[str], options: list[str], monkeypatch) -> None:
    """`accelerate launch SCRIPT ...` in this process."""
    args = launch_command_parser().parse_args(command[2:])
    assert _validate_launch_command(args)[0].num_processes == 1
    monkeypatch.setattr(sys, "argv", [args.training_script, *args.training_script_args, *options])
    runpy.run_path(args.training_script, run_name="__main__")


def pack(command: list[str], text: str) -> None:
    words = [text if word.startswith("Qwen/") else word for word in command[1:]]
    assert cli.main([*words, "--image-seq-length", "4", "--max-length", "32", "--num-workers", "1"]) == 0


def test_commands_that_need_no_gpu(place, backbones, monkeypatch, capsys):
    (mixture,) = re.findall(r"^```yaml\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    options = yaml.safe_load(mixture)
    for source in options["train_packs"]:
        pack(
            ["open-qwen2vl", "pack", "shards/", "--output", source["path"], "--tokenizer", "Qwen/"], backbones["text"]
        )
    (place / "mixture.yaml").write_text(mixture)
    tiny = TINY.split() + ["--vision_model", backbones["vision"], "--text_model", backbones["text"]]
    for command in filter(runs_here, commands()):
        if command[:2] == ["open-qwen2vl", "pack"]:
            pack(command, backbones["text"])
        elif command[:2] == ["open-qwen2vl", "estimate"]:
            recipe = yaml.safe_load((ROOT / command[2]).read_text())
            recipe |= {"vision_model": backbones["vision"], "text_model": backbones["text"], "image_seq_length": 4}
            (place / "tiny.yaml").write_text(yaml.safe_dump(recipe))
            assert cli.main(["estimate", "tiny.yaml", *command[3:]]) == 0
        else:
            launch(command, tiny + ([] if "--max_steps" in command else ["--max_steps", "2"]), monkeypatch)

    printed = capsys.readouterr().out
    assert "language model" in printed and "GPU-hours" in printed and "FSDP2" in printed
    for run in ("2b", "mixture", "2b-evaluated", "profile"):
        assert (place / "runs" / run / "model" / "model.safetensors").exists()
    assert (place / "runs" / "profile" / "profile" / "trace-rank0.json.gz").exists()
    sources = json.loads((place / "runs" / "mixture" / "train_results.json").read_text())["sources"]
    assert set(sources) == {"ccs", "datacomp-mlm-dfn"}


def test_commands_for_elsewhere_have_known_options():
    elsewhere = [command for command in commands() if not runs_here(command)]
    assert len(elsewhere) == 4 and len(re.findall(r"[Nn]ot run|not been run", DOCUMENT)) == 3
    for command in elsewhere:
        if command[0] == "sbatch":
            assert command[:3] == ["sbatch", "--nodes", "4"] and (ROOT / command[3]).exists()
            assert (ROOT / command[4]).exists()
            words = command[5:]
        else:
            args = launch_command_parser().parse_args(command[2:])
            assert (ROOT / args.config_file).exists() and (ROOT / args.training_script).exists()
            words = args.training_script_args
        assert (ROOT / words[0]).exists() and words[1:] == ["--train_packs", "packs/", "--output_dir", "runs/2b"]


def test_what_the_text_names_exists():
    """Files of the recipes, options of the training, and keys of its logs."""
    for name in re.findall(r"`((?:recipes/)?[\w/]+\.(?:yaml|sbatch))`", DOCUMENT):
        assert (ROOT / name).exists() or (ROOT / "recipes" / "accelerate" / name).exists(), name
    from open_qwen2vl import PackedTrainingArguments

    for option in ("save_total_limit", "max_loss_rise", "projector_learning_rate", "activation_checkpointing"):
        assert f"`{option}" in DOCUMENT and option in PackedTrainingArguments.__dataclass_fields__
