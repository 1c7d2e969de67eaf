"""The three stages of Qwen2-VL: the commands at the heads of their YAML files, one after the other on a tiny model."""

import json
import os
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from safetensors.torch import load_file

from open_qwen2vl import cli
from open_qwen2vl.data import parse_sources
from tests.clips import clip, moving_frames
from tests.fork_server import forked_programs
from tests.qwen_vl import save_text_model
from tests.tars import write_caption_tar
from tests.tiny_clip import save_clip

ROOT = Path(__file__).parents[2]
STAGES = {"stage1": ("merger", "tower"), "stage2": ("merger", "tower", "language"), "stage3": ("merger", "language")}
TINY = (
    "--use_cpu --bf16=false --dataloader_num_workers 0 --gradient_accumulation_steps 2 --max_steps 2 --logging_steps 1"
)


def head(stage: str) -> list[list[str]]:
    """The commands in the comment that a file begins with, as words."""
    text = (ROOT / "recipes" / "qwen2_vl" / f"{stage}.yaml").read_text(encoding="utf8")
    code = "\n".join(re.findall(r"^#     (.*)$", text, re.MULTILINE))
    return [shlex.split(line) for line in code.replace("\\\n", "").splitlines()]


def turn(role: str, *content: str | dict) -> dict:
    """Texts stay texts; `{}` stands for an image."""
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else part or {"type": "image"} for part in content
    ]
    return {"role": role, "content": parts}


def write_lines(path: Path, *records: dict) -> None:
    path.write_text("\n".join(json.dumps(record) for record in records * 4))


def write_videos(folder: Path) -> None:
    """A clip beside a tar of captioned ones."""
    folder.mkdir()
    (folder / "a.mp4").write_bytes(clip(moving_frames(8), 4))
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(4):
            (folder / "text").write_text("a square moves")
            tar.add(folder / "a.mp4", f"{number}.mp4")
            tar.add(folder / "text", f"{number}.txt")


def write_data(folder: Path) -> None:
    """Of each kind that the heads name, a few samples."""
    (folder / "images").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.linear_gradient("L").convert("RGB").resize((90, 60)).save(folder / "images" / name)
    kinds = {"captions": ["a cat on a mat", "two dogs run"], "ocr": ["STOP", "OPEN 24 H"], "classes": ["cat", "dog"]}
    for kind, texts in kinds.items():
        (folder / kind).mkdir()
        write_caption_tar(folder / kind / "0.tar", texts * 6, size=(60, 90))
    (folder / "text").mkdir()
    write_lines(folder / "text" / "0.jsonl", {"text": "a page without any image"}, {"text": "and one more"})
    write_lines(
        folder / "pages.jsonl", {"texts": ["see this", None, "and", None], "images": [None, "a.png", None, "b.png"]}
    )
    write_videos(folder / "videos")
    film = turn("user", {"type": "video", "video": "a.mp4"}, "what moves?"), turn("assistant", "a square")
    write_lines(folder / "clips.jsonl", {"messages": [*film]})
    question = turn("user", {}, "what is shown?"), turn("assistant", "a cat")
    write_lines(folder / "vqa.jsonl", {"images": ["a.png"], "messages": [*question]})
    more = turn("user", "and here?", {}), turn("assistant", "a dog")
    write_lines(folder / "dialogues.jsonl", {"images": ["a.png", "b.png"], "messages": [*question, *more]})
    write_lines(
        folder / "documents.jsonl",
        {"images": ["b.png"], "messages": [turn("user", {}, "read it"), turn("assistant", "# A title\n\ntext")]},
    )
    box = {"type": "box", "label": "a cat", "box": [9, 6, 45, 30]}
    write_lines(
        folder / "boxes.jsonl",
        {"images": ["a.png"], "messages": [turn("user", {}, "where is it?"), turn("assistant", box)]},
    )
    call = {"type": "function", "function": {"name": "look", "arguments": {"far": True}}}
    moves = [turn("user", {}, "go"), {"role": "assistant", "content": "", "tool_calls": [call]}, turn("tool", {})]
    tool = {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {"far": {}}}}
    record = {"images": ["a.png", "b.png"], "messages": [*moves, turn("assistant", "done")]}
    write_lines(folder / "agents.jsonl", record | {"tools": [{"type": "function", "function": tool}]})
    write_lines(folder / "chats.jsonl", {"messages": [turn("user", "hello"), turn("assistant", "good day")]})


@pytest.fixture(scope="module")
def place(tmp_path_factory, qwen_vl_folder) -> Path:
    """A working folder; tiny checkpoints stand under the released ones' names."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "Qwen").mkdir()
    (folder / "Qwen/Qwen2-VL-2B-Instruct").symlink_to(qwen_vl_folder("qwen2_vl"))
    save_text_model(folder / "Qwen/Qwen2-1.5B", folder / "Qwen/Qwen2-VL-2B-Instruct")
    write_data(folder / "data")
    return folder


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By part."""
    parts: dict[str, dict[str, torch.Tensor]] = {"merger": {}, "tower": {}, "language": {}}
    for name, tensor in load_file(folder / "model.safetensors").items():
        part = "merger" if "visual.merger." in name else "tower" if "visual." in name else "language"
        parts[part][name] = tensor
    return parts


def train(words: list[str], path: str, place: Path) -> None:
    """What a launcher starts, in one process and for two steps."""
    args = launch_command_parser().parse_args(words[2:])
    assert (ROOT / args.config_file).exists()
    command = ["python", args.training_script, *args.training_script_args, *TINY.split()]
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_each_stage_goes_on_from_the_one_before(place, tmp_path_factory, monkeypatch, caplog):
    """Packs as the heads plan them; what is frozen stays to the last bit, all matrices of what is trained move."""
    monkeypatch.chdir(place)
    ends = {
        "init-vit": ["--clip", save_clip(place / "clip")],
        "pack": "--max-length 640 --max-video-tokens 64 --max-frames 8 --num-workers 1".split(),
    }
    before = place / "runs/init"
    with forked_programs(tmp_path_factory.mktemp("bin")) as path:
        for stage, trained in STAGES.items():
            *steps, launch = head(stage)
            for program, command, *words in steps:
                assert program == "open-qwen2vl" and cli.main([command, *words, *ends[command]]) == 0
            train(launch, path, place)
            old, new = weights(before), weights(place / "runs" / stage / "model")
            for part, tensors in new.items():
                same = {name for name, tensor in tensors.items() if torch.equal(tensor, old[part][name])}
                matrices = {name for name, tensor in tensors.items() if tensor.ndim > 1}
                assert same.isdisjoint(matrices) if part in trained else same == tensors.keys(), (stage, part, same)
            before = place / "runs" / stage / "model"


@pytest.mark.parametrize("stage", STAGES)
def test_comments_are_true(stage):
    """The head plans what the file reads and launches it; steps are as large as they are said to be."""
    text = (ROOT / "recipes" / "qwen2_vl" / f"{stage}.yaml").read_text(encoding="utf8")
    options = yaml.safe_load(text)
    sources = parse_sources(options["train_packs"])
    planned = [words[words.index("--output") + 1] for words in head(stage) if words[1] == "pack"]
    assert [source.path for source in sources] == planned
    assert sum(source.weight for source in sources) == pytest.approx(1)
    assert head(stage)[-1][-1] == f"recipes/qwen2_vl/{stage}.yaml"
    packs, device, accumulated = (
        int(re.search(pattern, text)[1])
        for pattern in (r"(\d+) packs a step", r"(\d+) \(per device\)", r"(\d+) \(acc")
    )
    assert device == options["per_device_train_batch_size"] and accumulated == options["gradient_accumulation_steps"]
    assert packs == device * accumulated * 8
    trained = {"merger": "projector", "tower": "vision_tower", "language": "language_model"}
    assert {part for part, name in trained.items() if options[f"train_{name}"]} == set(STAGES[stage])
