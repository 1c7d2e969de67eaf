"""The commands of docs/install.md as they stand, on a folder of pictures, a CSV and one question."""

import csv
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from PIL import Image

from open_qwen2vl import cli

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "install.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
TINY = "--use_cpu --max_steps 2 --dataloader_num_workers 0"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """`pictures/` with captions beside them, `pairs.csv` of the same pictures, and a question's picture."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "pictures").mkdir()
    rows = []
    for number, caption in enumerate(["a cat", "zwei Hunde", "two dogs, blue and green"]):
        path = tmp_path / "pictures" / f"{number}.{'png' if number else 'JPG'}"
        Image.new("RGB", (20, 30), (80 * number, 0, 0)).save(path, "PNG" if number else "JPEG")
        path.with_suffix(".txt").write_text(caption)
        rows.append({"path": f"pictures/{path.name}", "caption": caption})
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["path", "caption"])
        table.writeheader()
        table.writerows(rows)
    Image.new("RGB", (20, 30), "red").save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(command: str, monkeypatch, tokenizer: str) -> None:
    """A line of a shell block; Python in this process, with the sizes of a tiny model."""
    words = [tokenizer if word.startswith("Qwen/") else word for word in shlex.split(command)]
    if words[0] == "accelerate":
        args = launch_command_parser().parse_args(words[2:])
        monkeypatch.setattr(sys, "argv", [args.training_script, *args.training_script_args, *TINY.split()])
        runpy.run_path(args.training_script, run_name="__main__")
    elif words[0] == "python":
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(words[1], run_name="__main__")
    elif words[0] == "open-qwen2vl":
        extra = {"pack": ["--num-workers", "1"], "evaluate": ["--device", "cpu"]}[words[1]]
        assert cli.main([*words[1:], *extra]) == 0
    else:
        subprocess.run(command, shell=True, check=True)


def test_all_blocks_in_order(place, backbones, monkeypatch, capsys):
    (install, *blocks) = BLOCKS
    assert [line.split()[0] for line in install[1].splitlines()] == ["git", "python3", "pip"]
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, "docs/install.md", "exec"), {})
            continue
        for command in code.replace("\\\n", "").splitlines():
            run_command(command, monkeypatch, backbones["text"])
    for packs in ("packs", "small-packs"):
        totals = json.loads((place / packs / "plan.json").read_text())["totals"]
        assert (totals["samples"], totals["documents"], totals["skipped"]) == (6, 6, {})
    assert json.loads((place / "runs/small/train_results.json").read_text())["documents"] > 0
    assert "own_questions" in (place / "results/own/table.md").read_text()


def test_extras_and_files_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"^\| `([\w-]+)` \|", DOCUMENT, flags=re.MULTILINE)
    assert sorted(named) == sorted(project["optional-dependencies"])
    for link in re.findall(r"\]\(([^)]+)\)", DOCUMENT):
        assert (ROOT / "docs" / link).exists(), link
