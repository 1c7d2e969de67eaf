"""The recipe end to end: tars, plan, `accelerate launch`, kill, rerun, and what a user can get wrong."""

import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from open_qwen2vl import PackedTrainingArguments, cli
from open_qwen2vl.places import place
from open_qwen2vl.trainer import parse_arguments
from open_qwen2vl.trainer.run import asked_checkpoint
from tests.fork_server import fork_program, forked_programs, has_ended

RECIPES = Path(__file__).parents[2] / "recipes"
WITHOUT_FLASH = pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def write_tar(path: Path, samples: int, seed: int) -> None:
    """Small random pictures with captions; two of the pictures are cut off."""
    rng, pixels = random.Random(seed), np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(samples):
            picture = io.BytesIO()
            Image.fromarray(pixels.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(picture, "JPEG")
            data = picture.getvalue()[: 200 if i in (3, 7) else None]
            caption = " ".join(rng.choices(["a", "photo", "of", "two", "dogs", "blue", "cat"], k=rng.randint(1, 9)))
            for name, content in ((f"{i:04}.jpg", data), (f"{i:04}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def config(tmp_path_factory, backbones) -> Path:
    """A YAML for 30 steps of two packs on a plan of 80 pairs."""
    folder = tmp_path_factory.mktemp("pretrain")
    for i in range(2):
        write_tar(folder / f"{i}.tar", 40, seed=i)
    packs = ["--output", str(folder / "packs"), "--image-seq-length", "4", "--max-length", "64", "--num-workers", "1"]
    assert cli.main(["pack", str(folder), "--tokenizer", backbones["text"], *packs]) == 0
    options = {
        "vision_model": backbones["vision"],
        "text_model": backbones["text"],
        "train_packs": str(folder / "packs"),
        "eval_packs": str(folder / "packs"),
        "eval_strategy": "steps",
        "eval_steps": 20,
        "per_device_train_batch_size": 2,
        "max_steps": 30,
        "learning_rate": 2e-3,
        "weight_decay": 0.01,
        "logging_steps": 2,
        "save_steps": 5,
        "dataloader_num_workers": 1,
        "use_cpu": True,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def run_here(monkeypatch, *argv) -> None:
    """The script as `python recipes/pretrain.py ARGV` runs it, without starting Python again."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, argv)])
    runpy.run_path(str(RECIPES / "pretrain.py"), run_name="__main__")


def losses(checkpoint: Path) -> list[tuple[int, float]]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [(log["step"], log.get("loss", log.get("eval_loss"))) for log in history]


def test_packs_in_a_bucket_train(config, memory, backbones, monkeypatch, tmp_path):
    """The recipe on tars and a plan behind URLs; in one process, for other processes do not see this kind."""
    for number in range(2):
        (place(memory) / f"{number}.tar").write_bytes((config.parent / f"{number}.tar").read_bytes())
    plan = ["--image-seq-length", "4", "--max-length", "64", "--num-workers", "1", "--output", f"{memory}/packs"]
    assert cli.main(["pack", memory, "--tokenizer", backbones["text"], *plan]) == 0
    options = yaml.safe_load(config.read_text()) | {"train_packs": f"{memory}/packs", "max_steps": 2}
    options |= {
        "eval_strategy": "no",
        "eval_packs": None,
        "dataloader_num_workers": 0,
        "cache_dir": str(tmp_path / "c"),
    }
    recipe = tmp_path / "bucket.yaml"
    recipe.write_text(yaml.safe_dump({name: value for name, value in options.items() if value is not None}))
    run_here(monkeypatch, recipe, "--output_dir", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "train_results.json").read_text())["steps"] == 2
    assert len(list((tmp_path / "c").glob("*.shard"))) == 2
    with pytest.raises(SystemExit):
        run_here(monkeypatch, recipe, "--output_dir", tmp_path / "other", "--train_packs", f"{memory}/none")


@pytest.fixture(scope="module")
def launched(config, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    output_dir = config.parent / "launched"
    command = ["accelerate", "launch", "--config_file", str(RECIPES / "accelerate" / "single_gpu.yaml")]
    command += [str(RECIPES / "pretrain.py"), str(config), "--output_dir", str(output_dir)]
    with forked_programs(tmp_path_factory.mktemp("bin")) as path:
        done = subprocess.run(command, env={**ENVIRONMENT, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return output_dir, done


def test_accelerate_launch_trains_and_saves_all(launched, backbones):
    output_dir, done = launched
    assert {path.name for path in output_dir.iterdir()} == {
        "README.md",
        "model",
        "loss.png",
        "train_results.json",
        *(f"checkpoint-{step}" for step in range(5, 31, 5)),
    }
    with Image.open(output_dir / "loss.png") as image:
        image.load()
    results = json.loads((output_dir / "train_results.json").read_text())
    assert results["steps"] == 30 and results["images"] == results["documents"] > 60
    assert results["final_loss"] < losses(output_dir / "checkpoint-5")[0][1]
    # Four cut-off pictures, met in every epoch.
    assert set(results["dropped_documents"]) == {"corrupt_image"}
    assert results["dropped_documents"]["corrupt_image"] >= 4 * int(results["epochs"])
    assert f"{results['dropped_documents']['corrupt_image']} corrupt_image" in done.stdout
    assert f"{results['tokens']:,}" in done.stdout and "tokens/s" in done.stdout
    assert "tok/s" in done.stderr and "30/30" in done.stderr and "eval loss" in done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    # What it does, from the first second.
    told = [line for line in done.stderr.splitlines() if line.startswith("INFO ")]
    assert told[0] == "INFO importing torch, transformers and open_qwen2vl"
    order = ["reading the plan of", "building a new model from", "training ", " packs, 2 a step, 1 devices"]
    assert [next(i for i, line in enumerate(told) if text in line) for text in order] == list(range(1, 5)), told
    card = (output_dir / "README.md").read_text()
    assert card == (output_dir / "model" / "README.md").read_text()
    assert "| Steps | 30 |" in card and "| Samples read | 80 |" in card and "| learning_rate | 0.002 |" in card

    model = AutoModelForImageTextToText.from_pretrained(output_dir / "model")
    processor = AutoProcessor.from_pretrained(output_dir / "model")
    image = Image.new("RGB", (50, 30), "red")
    inputs = processor(images=[image], text=f"<s>{processor.image_token}\n", return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]


def test_a_killed_run_goes_on_with_the_very_same_losses(launched, config, monkeypatch, capsys):
    whole, _ = launched
    output_dir = config.parent / "killed"
    log = config.parent / "killed.log"
    child = fork_program("python", RECIPES / "pretrain.py", config, "--output_dir", output_dir, log=log)
    while not (output_dir / "checkpoint-10" / "model.safetensors").exists():
        assert not has_ended(child), log.read_text()[-3000:]
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not (output_dir / "model").exists()

    run_here(monkeypatch, config, "--output_dir", output_dir)
    assert losses(output_dir / "checkpoint-30") == losses(whole / "checkpoint-30")
    expected, found = (json.loads((run / "train_results.json").read_text()) for run in (whole, output_dir))
    for name in ("steps", "tokens", "documents", "images", "flops", "final_loss", "dropped_documents"):
        assert found[name] == expected[name], name
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, output_dir)]
    assert weights[0] == weights[1]

    # Once more: nothing is left to train, and nothing changes.
    capsys.readouterr()
    run_here(monkeypatch, config, "--output_dir", output_dir)
    assert json.loads((output_dir / "train_results.json").read_text()) == found
    assert (output_dir / "model" / "model.safetensors").read_bytes() == weights[0]
    assert f"{found['tokens']:,}" in capsys.readouterr().out


def test_the_first_line_comes_before_torch():
    """Without any library to be found, so before any is looked for."""
    done = subprocess.run([sys.executable, "-S", str(RECIPES / "pretrain.py")], capture_output=True, text=True)
    first, *rest = done.stderr.splitlines()
    assert first.startswith("INFO importing torch") and rest[-1].startswith("ModuleNotFoundError")


@pytest.mark.parametrize("value", ["true", "{newest}", "{run}"])
def test_resuming_by_name(launched, config, tmp_path, value):
    """True is the newest checkpoint, as nothing is; a folder is a checkpoint or a run."""
    run = launched[0]
    value = value.format(newest=run / "checkpoint-30", run=run)
    args = PackedTrainingArguments(str(run), use_cpu=True, resume_from_checkpoint=value)
    assert asked_checkpoint(args) == str(run / "checkpoint-30")
    args.resume_from_checkpoint, fresh = "false", PackedTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="is false, but .*checkpoint-30 is there"):
        asked_checkpoint(args)
    fresh.resume_from_checkpoint = "true"
    assert asked_checkpoint(fresh) is None


def test_a_checkpoint_trains_on(launched, tmp_path, config, monkeypatch, backbones):
    options = yaml.safe_load(config.read_text())
    del options["vision_model"], options["text_model"]
    options |= {"model_name_or_path": str(launched[0]), "dataloader_num_workers": 0, "max_steps": 2}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(options))
    run_here(monkeypatch, path, "--output_dir", tmp_path / "run", "--eval_strategy", "no", "--eval_packs=")
    assert json.loads((tmp_path / "run" / "train_results.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_packs", "nowhere"], "nowhere does not exist; a folder that `open-qwen2vl pack"),
        (["--train_packs", "{config}"], "config.yaml is a file; a folder that `open-qwen2vl pack"),
        (["--dataset_name", "pairs.csv"], "unknown option '--dataset_name': data are planned first"),
        (["--image_seq_length", "16"], "was planned for 4"),
        (["--model_name_or_path", "x"], "either vision_model and text_model, or model_name_or_path"),
        (["--eval_strategy", "no"], "eval_packs and eval_strategy"),
        (["--vision_model", "/nowhere"], "/nowhere"),
        (["--learning_rat", "1"], "did you mean 'learning_rate'"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint: nowhere is no complete checkpoint"),
        (["--output_dir", "{config}"], "config.yaml is a file"),
        (["--ignore_data_skip"], "ignore_data_skip is not supported: a resumed run would read packs again"),
        (["--train_sampling_strategy", "sequential"], "train_sampling_strategy is not supported"),
        (["--report_to", "clearml"], "report_to: clearml is not installed"),
        pytest.param(
            ["--attn_implementation", "flash_attention_2"],
            "attn_implementation flash_attention_2: ",
            marks=WITHOUT_FLASH,
        ),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(config, tmp_path, monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        options = [option.format(config=config) for option in options]
        run_here(monkeypatch, config, "--output_dir", tmp_path / "run", *options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert error.startswith("pretrain.py: error: ") and message in error
    assert not (tmp_path / "run" / "model").exists()


def test_help_lists_options_and_defaults(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(option in text for option in ("CONFIG.yaml", "--train_packs", "--vision_model", "(default: cosine)"))


def test_the_full_size_config_is_valid(tmp_path):
    recipe = runpy.run_path(str(RECIPES / "pretrain.py"))
    classes = (recipe["ModelArguments"], recipe["DataArguments"], PackedTrainingArguments)
    path = str(RECIPES / "pretrain_2b.yaml")
    model, data, args = parse_arguments(
        classes, "", [path, "--bf16=false", "--use_cpu", "--output_dir", str(tmp_path)]
    )
    assert (model.image_seq_length, data.train_packs, args.weight_decay) == (144, "packs", 0.01)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 256
    assert args.learning_rate == 5e-5 and args.get_warmup_steps(4768) == 144
