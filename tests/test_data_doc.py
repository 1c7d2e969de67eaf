"""The chapter "From a pool to a mixture" of docs/data.md, its commands as they stand, on real pictures."""

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from open_qwen2vl import cli
from open_qwen2vl.data import plan_packs
from open_qwen2vl.data.storage.uids import read_uids
from tests.chat_server import chat_server
from tests.data.conftest import encode_image, make_sample, write
from tests.data.scoring.conftest import save_tiny_clip
from tests.decontamination.conftest import drawings, photographs

DOCUMENT = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf8")
CHAPTER = DOCUMENT.split("\n## From a pool to a mixture\n")[1].split("\n## ")[0]
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```bash\n(.*?)^```", CHAPTER, flags=re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
]
QUESTION = "how many of the people who are standing beside the river wear a hat that is blue"
SOURCES = yaml.safe_load(re.search(r"^```yaml\n(# sources.yaml\n.*?)^```", CHAPTER, flags=re.MULTILINE | re.DOTALL)[1])
RECIPE = str(Path(__file__).parents[1] / "recipes" / "pretrain.py")
OPTIONS = {
    "pack": ["--num-workers", "1", "--image-seq-length", "4", "--max-length", "96"],
    "mix": ["--recipe", RECIPE, "--proxies", "7", "--steps", "2", "--check-seeds", "1"],
    "decontaminate": ["--num-workers", "1", "--self-test", "2"],
    "score": ["--num-workers", "1"],
    "filter": ["--threads", "1"],
    "reshard": ["--num-workers", "1"],
}


def as_it_runs_here(command: list[str], clip: str, endpoint: str, tokenizer: str) -> list[str]:
    """In place of a model of the hub a tiny one of random weights; one worker."""
    if "--tokenizer" in command:
        command[command.index("--tokenizer") + 1] = tokenizer
    if "--pretrained" in command:
        start = command.index("--model")
        command = [*command[:start], "--model", f"local-dir:{clip}", "--device", "cpu", *command[start + 4 :]]
    if "--endpoint" in command:
        command[command.index("--endpoint") + 1] = endpoint
    return [*command[1:], *OPTIONS.get(command[1], [])]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A pool of 30 pairs, of which pair 3 is an evaluation picture and pair 5 asks an evaluation question."""
    evaluation, pictures = photographs()[4], photographs()[5:9] + drawings()
    members = []
    for number in range(30):
        picture = evaluation.resize((90, 90)) if number == 3 else pictures[number % len(pictures)]
        text = QUESTION if number == 5 else f"a cat and a dog number {number}" if number % 2 else f"a zebra {number}"
        members += make_sample(f"{number:03}", text, encode_image(picture, "JPEG"), f"{number:032x}")
    for folder in ("pool", "evaluation_pictures"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "pool/00000.tar", members)
    evaluation.save(tmp_path / "evaluation_pictures/street.png")
    pq.write_table(pa.table({"question": [QUESTION], "answer": ["two"]}), tmp_path / "questions.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def numbers(path: Path) -> list[int]:
    return [int(low) for _, low in read_uids(path)]


def test_the_chapter_runs_as_it_stands(place, tmp_path_factory, backbones, capsys):
    clip = save_tiny_clip(tmp_path_factory.mktemp("clip"))
    with chat_server(lambda _: (200, "A picture that somebody looked at.")) as server:
        for command in COMMANDS:
            assert command[0] == "open-qwen2vl"
            if command[1] != "mix":  # which trains: the next test
                here = as_it_runs_here(command, clip, server.url, backbones["text"])
                assert cli.main(here) == 0, capsys.readouterr().err
    assert numbers(place / "clean.npy") == [number for number in range(30) if number not in (3, 5)]
    report = capsys.readouterr().out
    assert "found      1 pictures and 0 texts of evaluation_pictures" in report
    assert "0 concepts of more than 20,000" in report
    clean, balanced = (set(numbers(place / name)) for name in ("clean.npy", "balanced.npy"))
    # The pictures come again after twelve pairs.
    assert 0 in balanced <= clean and not any(number - 12 in clean for number in balanced)
    assert set(numbers(place / "best.npy")) == set(range(30))  # fewer than a hundred of each
    assert " new, " in report


@pytest.mark.slow
def test_the_mixture_of_the_chapter(place, backbones, tokenizer, capsys):
    """The file as it stands, on the pool's pairs and a few texts, for two steps each."""
    texts = [json.dumps({"text": f"a cat and a dog number {number}"}) for number in range(20)]
    (place / "texts.jsonl").write_text("\n".join(texts))
    for entry in (*SOURCES["train_packs"], *SOURCES["eval_packs"]):
        shard = "pool/00000.tar" if entry["path"].endswith(("captions", "balanced")) else "texts.jsonl"
        plan_packs([place / shard], place / entry["path"], tokenizer, image_seq_length=4, max_length=96, num_workers=1)
    models = {"vision_model": backbones["vision"], "text_model": backbones["text"]}
    options = {**SOURCES, **models, "bf16": False, "use_cpu": True, "dataloader_num_workers": 0}
    (place / "sources.yaml").write_text(yaml.safe_dump(options))
    (command,) = (command for command in COMMANDS if command[1] == "mix")
    assert cli.main(as_it_runs_here(command, "", "", backbones["text"])) == 0, capsys.readouterr().err
    assert "weight     balanced: " in (report := capsys.readouterr().out) and "trained (1 seeds)" in report
    assert set(yaml.safe_load((place / "runs/mix/mixture.yaml").read_text())) == {*options}
