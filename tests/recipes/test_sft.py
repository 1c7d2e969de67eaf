"""The fine-tuning recipe end to end: LLaVA json, plan, training, kill, rerun, adapters, and a user's mistakes."""

import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, PackedSFTConfig, cli
from open_qwen2vl.trainer import parse_arguments
from open_qwen2vl.trainer.lora import load_lora, merged_model

RECIPES = Path(__file__).parents[2] / "recipes"
WITHOUT_FLASH = pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
WORDS = ["a", "photo", "of", "two", "dogs", "blue", "cat"]


def make_record(number: int, folder: Path) -> dict:
    """One of LLaVA's records: a picture or none, one to three questions; every tenth picture is cut off."""
    rng = random.Random(number)
    turns = [
        {"from": speaker, "value": " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))}
        for _ in range(rng.randint(1, 3))
        for speaker in ("human", "gpt")
    ]
    if number % 4 == 3:
        return {"id": str(number), "conversations": turns}
    name = f"{number}.png"
    pixels = np.random.default_rng(number).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    if number % 10 == 0:
        (folder / name).write_bytes((folder / name).read_bytes()[:300])
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return {"id": str(number), "image": name, "conversations": turns}


@pytest.fixture(scope="module")
def model_folder(backbones, processor, tmp_path_factory) -> Path:
    """A model as pre-training leaves it."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    model = OpenQwen2VLForConditionalGeneration.from_vision_text_pretrained(**backbones, image_seq_length=4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory, model_folder) -> Path:
    """A YAML for 12 steps of two packs on a plan of 60 conversations, 16 tokens an image instead of the model's 4."""
    folder = tmp_path_factory.mktemp("sft")
    (folder / "images").mkdir()
    records = [make_record(number, folder / "images") for number in range(60)]
    (folder / "llava.json").write_text(json.dumps(records))
    files = [str(folder / "llava.json"), "--images", str(folder / "images"), "--output", str(folder / "packs")]
    sizes = ["--image-seq-length", "16", "--max-length", "256", "--num-workers", "1"]
    assert cli.main(["pack", *files, "--tokenizer", str(model_folder), *sizes]) == 0
    options = {
        "model_name_or_path": str(model_folder),
        "train_packs": str(folder / "packs"),
        "per_device_train_batch_size": 2,
        "max_steps": 12,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "save_steps": 3,
        "dataloader_num_workers": 1,
        "use_cpu": True,
        "bf16": False,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def run_here(monkeypatch, *argv) -> None:
    """The script as `python recipes/sft.py ARGV` runs it, without starting Python again."""
    monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, argv)])
    runpy.run_path(str(RECIPES / "sft.py"), run_name="__main__")


def results(run: Path) -> dict:
    return json.loads((run / "train_results.json").read_text())


def losses(checkpoint: Path) -> list[tuple[int, float]]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [(log["step"], log["loss"]) for log in history if "loss" in log]


def answer(model, processor) -> torch.Tensor:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\na photo"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[Image.new("RGB", (50, 30), "red")], text=text, return_tensors="pt")
    return model.eval().generate(**inputs, max_new_tokens=5, do_sample=False)


@pytest.mark.slow  # as test_pretrain.py's, and trainer/test_kills.py has the harder cases
def test_killed_and_run_again(config, tmp_path, monkeypatch, capsys):
    """A process until it is killed; here to the end, with the losses of an undisturbed run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_here(monkeypatch, config, "--output_dir", whole)
    command = [sys.executable, str(RECIPES / "sft.py"), str(config), "--output_dir", str(killed)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    while not (killed / "checkpoint-3").exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "model").exists()
    run_here(monkeypatch, config, "--output_dir", killed)

    assert losses(killed / "checkpoint-12") == losses(whole / "checkpoint-12")
    assert (killed / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    found = results(killed)
    assert {name: found[name] for name in ("tokens", "images", "dropped_documents")} == {
        name: results(whole)[name] for name in ("tokens", "images", "dropped_documents")
    }
    assert set(found["dropped_documents"]) == {"corrupt_image"}
    assert losses(whole / "checkpoint-12")[-1][1] < losses(whole / "checkpoint-12")[0][1]
    assert {"model", "loss.png", "train_results.json"} <= {path.name for path in whole.iterdir()}
    model, processor = (auto.from_pretrained(whole / "model") for auto in (AutoModelForImageTextToText, AutoProcessor))
    assert model.config.image_seq_length == processor.image_seq_length == 16
    assert answer(model, processor).shape[1] > 20


def test_an_adapter_from_the_command_line(config, model_folder, tmp_path, monkeypatch, capsys):
    """bf16 weights under bf16 autocast, as in sft_lora_24gb.yaml; then chat, which finds the base by the adapter."""
    lora = ["--use_peft", "--lora_r", 4, "--lora_target_modules", "q_proj", "v_proj"]
    bf16 = ["--dtype", "bfloat16", "--bf16=true"]
    run_here(monkeypatch, config, "--output_dir", tmp_path, "--max_steps", 3, *lora, *bf16)
    assert "trained" in capsys.readouterr().out
    adapter = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (4, str(model_folder))
    assert adapter["modules_to_save"] == ["multi_modal_projector"] and "q_proj|v_proj" in adapter["target_modules"]
    assert not (tmp_path / "model" / "model.safetensors").exists()
    base = AutoModelForImageTextToText.from_pretrained(model_folder, image_seq_length=16)
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert processor.image_seq_length == 16
    adapted = load_lora(base, tmp_path / "model")
    expected = answer(adapted, processor)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype="float32", image_seq_length=16)
    assert torch.equal(answer(loaded, processor), expected)
    merged = merged_model(tmp_path / "model", dtype="float32")
    assert merged.config.image_seq_length == 16 and torch.equal(answer(merged, processor), expected)
    image = tmp_path / "red.png"
    Image.new("RGB", (50, 30), "red").save(image)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a photo\n"))
    assert cli.main(["chat", str(tmp_path), "--image", str(image), "--max-new-tokens", "3"]) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert card == (tmp_path / "README.md").read_text()
    assert f"LoRA adapter of `{model_folder}`" in card and "| Steps | 3 |" in card and "TRL" not in card
    # The run's folder is a model to train on: merged into its base.
    run_here(monkeypatch, config, "--model_name_or_path", tmp_path, "--output_dir", tmp_path / "on", "--max_steps", 1)
    assert (tmp_path / "on" / "model" / "config.json").exists()


def test_qlora_from_the_command_line(config, tmp_path, monkeypatch):
    qlora = ["--use_peft", "--load_in_4bit", "--no_train_projector"]
    run_here(monkeypatch, config, "--output_dir", tmp_path, "--max_steps", 2, *qlora)
    adapter = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert adapter["modules_to_save"] is None and results(tmp_path)["steps"] == 2


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """The same kind of conversations in TRL's form: a jsonl with its images, and a saved data set of two splits."""
    folder = tmp_path_factory.mktemp("rows")
    records = [make_record(number, folder) for number in range(1, 9)]
    lines = [
        {
            "messages": [
                {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
                for turn in record["conversations"]
            ],
            "images": [record["image"]] if "image" in record else [],
        }
        for record in records
    ]
    lines[0]["images"] = ["../../secret.png"]
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        line["images"] = [Image.new("RGB", (9, 9)) for _ in line["images"]]
    dataset = Dataset.from_list(lines)
    DatasetDict({"train": dataset.select(range(6)), "test": dataset.select([6, 7])}).save_to_disk(folder / "saved")
    return folder


def test_unpacked(config, rows, model_folder, tmp_path, monkeypatch):
    options = {**yaml.safe_load(config.read_text()), "max_steps": 4, "dataloader_num_workers": 0}
    del options["train_packs"]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(options))
    run_here(monkeypatch, config, "--dataset_name", rows / "chats.jsonl", "--output_dir", tmp_path / "file")
    found = results(tmp_path / "file")
    assert (found["documents"], found["dropped_documents"]) == (7, {"unsafe_image_path": 1})
    assert AutoProcessor.from_pretrained(tmp_path / "file" / "model").image_seq_length == 16  # all patches
    split = ["--eval_strategy", "steps", "--eval_steps", 2, "--image_seq_length", 4, "--max_steps", 3]
    run_here(monkeypatch, config, "--dataset_name", rows / "saved", "--output_dir", tmp_path / "saved", *split)
    assert results(tmp_path / "saved")["documents"] == 6
    history = json.loads((tmp_path / "saved/checkpoint-3/trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in log for log in history)
    with pytest.raises(SystemExit):
        run_here(monkeypatch, config, "--dataset_name", rows / "saved", "--dataset_train_split", "validation")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_packs", "nowhere"], "nowhere does not exist; a folder that `open-qwen2vl pack"),
        (["--image_seq_length", "4"], "was planned for 16"),
        (["--model_name_or_path", "/nowhere"], "/nowhere"),
        (["--eval_strategy", "steps"], "eval_packs and eval_strategy"),
        (["--dataset_name", "x"], "either train_packs or dataset_name"),
        (["--load_in_4bit"], "load_in_4bit needs use_peft"),
        (["--lora_r", "8"], "lora_r has no effect without use_peft"),
        (["--dtype", "float7"], "dtype is 'float7', none of float32, bfloat16"),
        (["--use_peft", "--lora_target_modules", "qproj"], "choose from q_proj"),
        (["--use_peft", "--train_vision_tower"], "train_vision_tower does not go with an adapter"),
        (["--packing"], "packing is not supported: it prepares TRL's"),
        (["--lora_rank", "8"], "unknown option"),
        (
            ["--trust_remote_code"],
            "trust_remote_code is not supported: code that comes with a checkpoint is never run",
        ),
        (["--model_init_kwargs", '{"revision": "x"}'], "model_init_kwargs is not supported"),
        pytest.param(
            ["--attn_implementation", "flash_attention_2"], "installed. (pip install flash-attn)", marks=WITHOUT_FLASH
        ),
        (["--train_packs=", "--dataset_name", "{empty}"], "empty.jsonl is empty"),
        (["--train_packs=", "--dataset_name", "{broken}"], "cannot read {broken}: "),
        (["--train_packs=", "--dataset_name", "{lines}"], "lines.jsonl"),
        (["--train_packs=", "--dataset_name", "{words}"], "no column messages or conversations among text"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(config, tmp_path, monkeypatch, capsys, options, message):
    files = {"empty": "", "broken": '{"messages": [{"role"\n', "lines": "\n\n", "words": '{"text": "a"}\n'}
    places = {name: str(tmp_path / f"{name}.jsonl") for name in files}
    for name, text in files.items():
        Path(places[name]).write_text(text)
    options = options if "{" in options[-1][:1] and '"' in options[-1] else [o.format(**places) for o in options]
    message = message.format(**places)
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, config, "--output_dir", tmp_path / "run", *options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert error.startswith("sft.py: error: ") and message in error
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("name", ["sft_llava665k", "sft_mammoth10m", "sft_lora_24gb"])
def test_the_full_size_configs_are_valid(name):
    recipe = runpy.run_path(str(RECIPES / "sft.py"))
    classes = (recipe["ModelArguments"], recipe["DataArguments"], PackedSFTConfig)
    model, data, args = parse_arguments(classes, "", [str(RECIPES / f"{name}.yaml"), "--use_cpu"])
    assert model.use_peft == (name == "sft_lora_24gb") and data.train_packs.startswith("packs/")
    devices = 1 if model.use_peft else 8
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * devices == 32
    if not model.use_peft:
        assert (args.learning_rate, args.weight_decay, args.num_train_epochs) == (2e-5, 0.1, 1)
        assert args.warmup_steps == 0.03 and args.lr_scheduler_type == "cosine"
    assert args.activation_checkpointing and args.gradient_checkpointing


def test_the_speedruns_second_stage_is_valid():
    recipe = runpy.run_path(str(RECIPES / "sft.py"))
    classes = (recipe["ModelArguments"], recipe["DataArguments"], PackedSFTConfig)
    model, data, args = parse_arguments(classes, "", [str(RECIPES / "speedrun/sft.yaml"), "--use_cpu"])
    text = (RECIPES / "speedrun/sft.yaml").read_text()
    assert f"--output {data.train_packs}" in text and "recipes/sft.py recipes/speedrun/sft.yaml" in text
    assert f"output_dir: {model.model_name_or_path}\n" in (RECIPES / "speedrun/align.yaml").read_text()
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 8
