"""Both recipes on stock models of transformers: a mixture, parts and rates, a kill, all weights and adapters."""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, pipeline

from open_qwen2vl import PackedTrainingArguments, cli
from open_qwen2vl.trainer import parse_arguments
from tests.qwen_vl import save_qwen_vl
from tests.tars import write_caption_tar

RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = {"use_cpu": True, "dataloader_num_workers": 0, "logging_steps": 1, "max_steps": 4, "save_steps": 2}
ASKED = [{"type": "image"}, {"type": "text", "text": "what is shown?"}]


def run(monkeypatch, script: str, *argv) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    runpy.run_path(str(RECIPES / script), run_name="__main__")


def run_until_killed(monkeypatch, step: int, *argv) -> None:
    """The pre-training in a fork, which SIGKILL ends in the middle of a step."""
    child = os.fork()
    if child == 0:
        original = Trainer.training_step

        def training_step(self, *args, **kwargs):
            if self.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args, **kwargs)

        Trainer.training_step = training_step
        try:
            run(monkeypatch, "pretrain.py", *argv)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def losses(checkpoint: Path) -> list[float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [log.get("loss", log.get("eval_loss")) for log in history]


def write_chats(folder: Path) -> Path:
    """Six conversations; the first picture is broken."""
    for number in range(2):
        Image.new("RGB", (90 + 40 * number, 60), "red").save(folder / f"{number}.png")
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:90])
    turns = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "a cat"}]
    rows = [{"messages": turns, "images": [f"{min(number, 1)}.png"]} for number in range(6)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "chats.jsonl"


@pytest.fixture(
    scope="module",
    params=[
        "qwen2_vl",
        pytest.param("qwen2_5_vl", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", marks=pytest.mark.slow),
    ],
)
def place(request, tmp_path_factory) -> Path:
    """A checkpoint of a family in `model`, two plans of captions, one of conversations, and a YAML file."""
    folder = tmp_path_factory.mktemp(request.param)
    save_qwen_vl(folder / "model", request.param)
    write_caption_tar(folder / "wide.tar", ["a cat", "two dogs run", "blue and green"] * 5, size=(60, 150))
    write_caption_tar(folder / "tall.tar", ["red", "a duck"] * 5, size=(130, 60))
    options = ["--processor", str(folder / "model"), "--max-length", "96", "--num-workers", "1"]
    for name, files in {
        "wide": [folder / "wide.tar"],
        "tall": [folder / "tall.tar"],
        "chats": [write_chats(folder), "--images", folder],
    }.items():
        assert cli.main(["pack", *map(str, files), "--output", str(folder / name), *options]) == 0
    packs = {"path": str(folder / "wide"), "weight": 0.7}, {"path": str(folder / "tall"), "weight": 0.3}
    config = {
        **QUICK,
        "model_name_or_path": str(folder / "model"),
        "train_packs": list(packs),
        "eval_packs": str(folder / "tall"),
        "eval_strategy": "steps",
        "eval_steps": 3,
        "learning_rate": 1e-3,
        "projector_learning_rate": 2e-3,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_mixture_with_evaluation_killed_and_run_again(place, tmp_path, monkeypatch):
    """The very same losses and weights; merger and language model learn, and the folder is the Hub's."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(monkeypatch, "pretrain.py", place / "config.yaml", "--output_dir", whole)
    run_until_killed(monkeypatch, 3, place / "config.yaml", "--output_dir", killed)
    assert (killed / "checkpoint-2").exists() and not (killed / "model").exists()
    run(monkeypatch, "pretrain.py", place / "config.yaml", "--output_dir", killed)
    assert (
        losses(killed / "checkpoint-4") == losses(whole / "checkpoint-4") and len(losses(whole / "checkpoint-4")) == 6
    )
    assert (killed / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    results = json.loads((whole / "train_results.json").read_text())
    assert results["steps"] == 4 and results["images"] == results["documents"] > 0
    assert results["sources"].keys() == {"wide", "tall"} and all(one["tokens"] for one in results["sources"].values())

    before, after = weights(place / "model"), weights(whole / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    towers = {name for name in before if "visual." in name}
    merger = {name for name in towers if "merger" in name}
    assert changed & towers == merger and changed - towers == before.keys() - towers
    family = json.loads((place / "model/config.json").read_text())["model_type"]
    assert json.loads((whole / "model/config.json").read_text())["model_type"] == family
    card = (whole / "model" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == [family] and "trust_remote_code" not in card
    assert "Training data: wide" in card and "| projector" not in card

    asked = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (90, 60), "red")}, ASKED[1]]}]
    pipe = pipeline("image-text-to-text", model=str(whole / "model"))
    (answer,) = pipe(text=asked, max_new_tokens=3, return_full_text=False, do_sample=False)
    model, processor = (auto.from_pretrained(whole / "model") for auto in (AutoModelForImageTextToText, AutoProcessor))
    inputs = processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    said = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"] == processor.decode(said, skip_special_tokens=True)


def test_every_part_has_its_rate(place, tmp_path):
    recipe = runpy.run_path(str(RECIPES / "pretrain.py"))
    classes = (recipe["ModelArguments"], recipe["DataArguments"], PackedTrainingArguments)
    tower = ["--train_vision_tower", "--vision_tower_learning_rate", "1e-4", "--output_dir", str(tmp_path)]
    arguments = parse_arguments(classes, "", [str(place / "config.yaml"), *tower])
    trainer = recipe["build_trainer"](*arguments)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    rates = {names[p]: group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert len(rates) == len(names)
    for name, rate in rates.items():
        assert rate == (2e-3 if "merger" in name else 1e-4 if "visual" in name else 1e-3), name


@pytest.mark.parametrize("options", [[], ["--load_in_4bit"]], ids=["lora", "qlora"])
def test_adapters_on_conversations(place, tmp_path, monkeypatch, options):
    """A picture that cannot be read is counted; the saved adapter changes what the base model says."""
    start = ["--model_name_or_path", place / "model", "--train_packs", place / "chats", "--use_peft", "--lora_r", 2]
    settings = [f"--{name}={value}" for name, value in (QUICK | {"max_steps": 6}).items()]
    rates = ["--learning_rate", "0.05", "--bf16=false", "--output_dir", tmp_path]
    run(monkeypatch, "sft.py", *start, *settings, *rates, *options)
    adapter = json.loads((tmp_path / "model/adapter_config.json").read_text())
    assert adapter["modules_to_save"][0] == "merger"
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["steps"] == 6 and set(results["dropped_documents"]) == {"corrupt_image"}
    adapted = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype="float32")
    plain = AutoModelForImageTextToText.from_pretrained(place / "model", dtype="float32")
    ids = torch.arange(12)[None] + 40
    with torch.no_grad():
        assert not torch.allclose(adapted(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-3)


def test_rows_unpacked_from_the_folder_of_a_run(place, tmp_path, monkeypatch, capsys):
    start = ["--model_name_or_path", place / "model", "--dataset_name", place / "chats.jsonl", "--bf16=false"]
    settings = [f"--{name}={value}" for name, value in (QUICK | {"max_steps": 2}).items()]
    run(monkeypatch, "sft.py", *start, *settings, "--output_dir", tmp_path / "run")
    results = json.loads((tmp_path / "run/train_results.json").read_text())
    assert results["documents"] == results["images"] > 0
    # A run's folder names its model, here as everywhere.
    start[1] = tmp_path / "run"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "sft.py", *start, *settings, "--image_seq_length", "4", "--output_dir", tmp_path / "no")
    assert stop.value.code == 2 and "remove image_seq_length: it is Open-Qwen2VL's" in capsys.readouterr().err


def test_packs_of_another_family_are_refused_by_name(place, tmp_path, monkeypatch, capsys):
    # Its tokenizer alone makes a plan for Open-Qwen2VL.
    options = ["--tokenizer", str(place / "model"), "--max-length", "256", "--num-workers", "1"]
    assert cli.main(["pack", str(place / "wide.tar"), "--output", str(tmp_path / "other"), *options]) == 0
    for start, message in (
        (["--vision_model", "a", "--text_model", "b", "--train_packs", place / "wide"], "planned for another family"),
        (
            ["--model_name_or_path", place / "model", "--train_packs", tmp_path / "other"],
            "other was planned with another processor: family open_qwen2vl, now qwen",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, "pretrain.py", *start, "--output_dir", tmp_path / "run", "--use_cpu")
        assert stop.value.code == 2 and message in capsys.readouterr().err
