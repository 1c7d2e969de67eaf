"""The commands and the code of docs/qwen2_vl.md on a tiny Qwen2-VL, all in this process."""

import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl import PackedTrainingArguments, cli, prepare_for_packing
from open_qwen2vl.data.packing.options import PackOptions
from open_qwen2vl.families.boxes import write_boxes
from open_qwen2vl.families.interface import Media
from open_qwen2vl.families.qwen_vl.boxes import JsonBoxes, MarkedBoxes
from open_qwen2vl.families.qwen_vl.sizes import ImageSizes
from open_qwen2vl.processing.conversation_records import read_conversation
from tests.clips import clip, moving_frames
from tests.data.conftest import write
from tests.evaluation.conftest import datasets_cache, easyvqa  # noqa: F401 - fixtures
from tests.qwen_vl import save_text_model
from tests.tars import write_caption_tar
from tests.tiny_clip import save_clip

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "qwen2_vl.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
RELEASED = "Qwen/Qwen2-VL-2B-Instruct"
TINY = "--use_cpu --bf16=false --dataloader_num_workers 0 --gradient_accumulation_steps 1 --max_steps 2"


@pytest.fixture
def place(tmp_path, qwen_vl_folder, monkeypatch) -> Path:
    """A working folder with what the commands read; the tiny checkpoint lies under the released one's name."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "Qwen").mkdir()
    (tmp_path / RELEASED).symlink_to(qwen_vl_folder("qwen2_vl"))
    save_text_model(tmp_path / "Qwen/Qwen2-1.5B", tmp_path / RELEASED)
    for folder in ("shards", "pool", "images"):
        (tmp_path / folder).mkdir()
    for path in ("shards/0.tar", "pool/0.tar"):
        write_caption_tar(tmp_path / path, ["a cat", "two dogs run", "blue and green"] * 8, size=(60, 90))
    for path in ("photo.jpg", "images/cat.png"):
        Image.linear_gradient("L").convert("RGB").resize((90, 60)).save(tmp_path / path)
    write_coco(tmp_path)
    for folder in ("clips", "videos"):
        (tmp_path / folder).mkdir()
    data = clip(moving_frames(20), 10)
    for path in ("clip.mp4", "videos/a.mp4"):
        (tmp_path / path).write_bytes(data)
    write(tmp_path / "clips/0.tar", [("a.mp4", data), ("a.txt", b"it moves")])
    asked = [{"from": "human", "value": "<video>\nwhat happens?"}, {"from": "gpt", "value": "it moves"}]
    (tmp_path / "video.json").write_text(json.dumps([{"video": "a.mp4", "conversations": asked}]))
    turns = [{"from": "human", "value": "<image>\nwhat is shown?"}, {"from": "gpt", "value": "a cat on a mat"}]
    records = [{"id": str(number), "image": "cat.png", "conversations": turns} for number in range(6)]
    (tmp_path / "conversations.json").write_text(json.dumps(records))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_coco(folder: Path) -> None:
    """The annotations of one picture, with the name that COCO's have."""
    (folder / "annotations").mkdir()
    (folder / "train2017").mkdir()
    Image.linear_gradient("L").convert("RGB").resize((320, 180)).save(folder / "train2017/1.jpg")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 100.5, 60], "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 320, "height": 180}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "red car"}],
    }
    (folder / "annotations/instances_train2017.json").write_text(json.dumps(content))


def launch(words: list[str], monkeypatch) -> None:
    args = launch_command_parser().parse_args(words[2:])
    monkeypatch.setattr(sys, "argv", [args.training_script, *args.training_script_args, *TINY.split()])
    runpy.run_path(args.training_script, run_name="__main__")


def check_loop(scope: dict) -> None:
    """The loop's loss is that of the prepared model with the attention that it gets by itself."""
    plain = AutoModelForImageTextToText.from_pretrained(RELEASED)
    assert type(plain) is not type(scope["model"]) and isinstance(scope["model"], type(plain))
    prepared = prepare_for_packing(plain, scope["processor"])
    with torch.no_grad():
        torch.testing.assert_close(prepared(**scope["batch"]).loss, scope["loss"], atol=1e-5, rtol=1e-5)
    scope["loss"].backward()


def test_all_blocks_in_order(place, easyvqa, monkeypatch, capsys):  # noqa: F811 - the fixture imported above
    ends = {
        "pack": "--max-length 192 --num-workers 1",
        "extract-frames": "--num-workers 1",
        "init-vit": f"--clip {save_clip(place / 'clip')}",
        "chat": "--max-new-tokens 2",
        "evaluate": f"--tasks easyvqa_gen --include-path {easyvqa} --trust-task-code --limit 2 --device cpu",
    }
    (score,) = re.findall(r"`open-qwen2vl (score [^`]*)`", DOCUMENT)
    for kind, code in BLOCKS:
        if kind == "json":  # the box of test_boxes_as_the_text_has_them
            continue
        if kind == "python":
            scope: dict = {}
            exec(compile(code, "docs/qwen2_vl.md", "exec"), scope)
            if "loss" in scope:
                check_loop(scope)
            elif "transcript" in scope:  # tests/agent/test_run.py knows what an agent does
                assert 1 <= scope["transcript"].steps <= 8
            else:  # tests/grounding knows what boxes are
                assert "own_boxes" in code or Image.open("answer.png").size == (90, 60)
            continue
        for command in code.replace("\\\n", "").splitlines():
            program, *words = shlex.split(command)
            monkeypatch.setattr(sys, "stdin", io.StringIO("what is shown?\n"))
            if program == "accelerate":
                launch([program, *words], monkeypatch)
            elif "own_boxes" in words:
                assert cli.main([*words, "--max-new-tokens", "2", "--device", "cpu"]) == 0
            elif program == "open-qwen2vl" and words[0] != "demo":
                longer = ["--max-length", "2048"] if "packs/agent" in words else []
                assert cli.main([*words, *ends.get(words[0], "").split(), *longer]) == 0
            else:  # tests/recipes/ and tests/evaluation/test_families.py have these
                recipes = ("sh recipes/qwen2_vl/run.sh", "sh recipes/qwen2_vl/capabilities/run.sh")
                assert command in (*recipes, "open-qwen2vl demo runs/qwen-sft")
    for name in ("qwen", "qwen-sft"):
        assert (place / "runs" / name / "model" / "model.safetensors").exists()
    assert json.loads(Path("results/qwen-sft/results.json").read_text())["tasks"]["easyvqa_gen"]["num_samples"] == 2
    assert cli.main([*score.split(), "--device", "cpu"]) == 0
    assert list(Path("scores").rglob("*.parquet"))


def test_boxes_as_the_text_has_them(tmp_path):
    """The part and its three forms, in an image of 320 x 180 pixels."""
    section = DOCUMENT.split("\n## Boxes\n")[1].split("\n## ")[0].replace("\\|", "|")
    part = json.loads(re.search(r"^```json\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[1])
    question, answer = {"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": [part]}
    messages = read_conversation({"messages": [question, answer], "images": ["a.png"]}).messages
    forms = MarkedBoxes(), JsonBoxes(ImageSizes(14, 2, 56 * 56, 14 * 14 * 4 * 1280)), JsonBoxes(None)
    written = ["".join(part["text"] for part in write_boxes(messages, [Media("image", 320, 180)], form)[1]["content"])
               for form in forms]  # fmt: skip
    assert f"`{written[0]}`" in section and f"`{written[1]}`" in section
    assert written[2] == '[{"bbox_2d": [31, 111, 345, 444], "label": "red car"}]'
    for reason in ("box_outside", "bad_box", "empty_box", "box_without_image", "boxes_unsupported", "other_shape"):
        assert f"`{reason}`" in section


def test_what_the_text_says(place, capsys):
    """Tokens of an image, names of skips, options of the packing and of the training."""
    assert "a 224 x 224 image takes 64 and two marks" in DOCUMENT  # families/qwen_vl/test_sizes.py counts them
    for option in ("--min-pixels", "--max-pixels", "--fixed-resolution", "--processor"):
        assert option in DOCUMENT and option[2:].replace("-", "_") in PackOptions.__dataclass_fields__
    assert "`train_vision_tower`" in DOCUMENT and "train_vision_tower" in PackedTrainingArguments.__dataclass_fields__
    write_caption_tar(place / "shards/1.tar", ["too wide"], size=(2, 450))
    (place / "shards/1.tar").replace(place / "wide.tar")
    pack = ["pack", "wide.tar", "shards/0.tar", "--output", "packs/one", "--processor", RELEASED, "--num-workers", "1"]
    assert cli.main([*pack, "--max-length", "64"]) == 0
    assert json.loads(Path("packs/one/plan.json").read_text())["totals"]["skipped"] == {"image_aspect": 1}
    assert "`image_aspect`" in DOCUMENT and "`corrupt_image`" in DOCUMENT


def test_the_block_of_the_readme(place, monkeypatch):
    section = (ROOT / "README.md").read_text(encoding="utf8").split("\n## Qwen2-VL\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    pack, train = map(shlex.split, block.replace("\\\n", "").splitlines())
    assert cli.main([*pack[1:], "--max-length", "128", "--num-workers", "1"]) == 0
    launch(train, monkeypatch)
    assert AutoProcessor.from_pretrained("runs/qwen/model").image_processor.patch_size == 14
    assert all(
        (ROOT / path).exists() for path in re.findall(r"\]\(([^)]+)\)|`sh (\S+)`", section) for path in path if path
    )


def test_the_articles_rows_name_commands_options_and_modules_that_there_are():
    section = DOCUMENT.split("\n## The article, capability by capability\n")[1]
    assert "\n## " not in section  # the last one, that no later capability goes without a row
    commands = {command.__name__.rpartition(".")[2].replace("_", "-") for command in cli.COMMANDS}
    assert set(re.findall(r"`open-qwen2vl ([\w-]+)`", section)) <= commands
    options = {name.replace("_", "-") for name in PackOptions.__dataclass_fields__}
    assert set(re.findall(r"--([a-z][\w-]+)", section)) <= options
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 25 and all(line.count(" | ") == 1 for line in rows)
    for path in re.findall(r"`((?:families|modeling|processing)/[\w/.]+|[\w/]+\.(?:yaml|md|py))`", section):
        assert any(
            (ROOT / base / path).exists() for base in (".", "src/open_qwen2vl", "src/open_qwen2vl/families/qwen_vl")
        )
