"""Two gloo processes against one: same packs in every step, so same losses, weights, counts; DDP and real FSDP2."""

import json
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from open_qwen2vl import cli
from open_qwen2vl.trainer import newest_complete_checkpoint
from open_qwen2vl.trainer.checkpoints.completeness import missing_part
from tests.evaluation.easyvqa import write_tasks
from tests.fork_server import forked_programs
from tests.tars import break_images, write_caption_tar

SCRIPT = Path(__file__).with_name("train_and_resume.py")
RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
FSDP = ["accelerate", "launch", "--config_file", str(SCRIPT.with_name("fsdp2.yaml"))]
LAUNCHERS = {
    "ddp": ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "fsdp2": FSDP,
    "fsdp2_three": [*FSDP, "--num_processes", "3", "--fsdp_activation_checkpointing", "true"],
}
SOURCES = {"first": 1, "second": 1.5}  # epochs of each in one of the run
COUNTS = ("steps", "tokens", "documents", "images", "flops", "sources", "dropped_documents")

# Eight steps of four packs, in two epochs that end with a pack too few; a checkpoint lies within the second.
MIXTURE = {"data": "mixture", "num_train_epochs": 2, "projector_learning_rate": 5e-3, "weight_decay": 0.1}
SAVED = {**MIXTURE, "save_strategy": "steps", "save_steps": 3}
BF16 = {**MIXTURE, "bf16": True, "max_steps": 2}
# Sequential packs: the second of two processes gets the odd ones, which have no images.
TOWER = {"data": "packs", "train_vision_tower": True, "max_steps": 3, "optim": "sgd", "learning_rate": 0.05}
# The second of two steps has no label on any rank, and neither decay nor momentum may move a weight.
SILENT = {"data": "silent", "max_steps": 2, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
ALONE = {"per_device_train_batch_size": 2}  # of one process, for the same four packs a step


def plan(folder: Path, name: str, captions: int, tokenizer: str) -> None:
    """Packs of 40 positions from a tar of captions, of which two images cannot be read."""
    rng = random.Random(name)
    words = "a photo of two dogs in the park blue green red circles and squares on mat".split()
    (folder / f"{name}-tars").mkdir()
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(captions)]
    write_caption_tar(folder / f"{name}-tars" / "0.tar", texts, seed=captions)
    # Planned, for a plan does not open them; lost in training, on either rank.
    break_images(folder / f"{name}-tars" / "0.tar", slice(3, None, captions // 2))
    options = ["--tokenizer", tokenizer, "--image-seq-length", "4", "--max-length", "40", "--num-workers", "1"]
    assert cli.main(["pack", str(folder / f"{name}-tars"), "--output", str(folder / name), *options]) == 0


def run_here(folder: Path, label: str, runs: dict) -> dict:
    return runpy.run_path(str(SCRIPT))["main"](folder, label, runs)


def launch(launcher: str, folder: Path, runs: dict) -> dict:
    run_script(launcher, SCRIPT, str(folder), launcher, json.dumps(runs))
    return json.loads((folder / f"{launcher}.json").read_text())


def run_script(launcher: str, script: Path, *arguments: str) -> None:
    command = [*LAUNCHERS[launcher], str(script), *arguments]
    with tempfile.TemporaryDirectory() as bin, forked_programs(Path(bin)) as path:
        done = subprocess.run(command, env={**ENVIRONMENT, "PATH": path}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_pack, backbones):
    """Packs in memory, and plans of two sources."""
    folder = tmp_path_factory.mktemp("two_processes")
    packs = [make_pack(1 + 7 * i % 5, seed=i, with_images=i % 2 == 0, dropped={f"rank{i % 2}": 1}) for i in range(12)]
    packs[3] = make_pack(2, seed=3, with_images=False, supervised=False, dropped={"rank1": 1})
    torch.save(packs, folder / "packs.pt")
    silent = [make_pack(2, seed=i, supervised=i < 4) for i in range(8)]
    torch.save(silent, folder / "silent.pt")
    (folder / "backbones.json").write_text(json.dumps(backbones))
    plan(folder, "first", 24, backbones["text"])
    plan(folder, "second", 10, backbones["text"])
    return folder


@pytest.fixture(scope="module")
def one(folder) -> dict:
    """What one process makes of them."""
    runs = {"mixture": MIXTURE | ALONE, "tower": TOWER | ALONE, "bf16": BF16 | ALONE}
    runs |= {"silent": SILENT | ALONE, "loud": SILENT | ALONE | {"max_steps": 1}}
    return run_here(folder, "one", runs)


def assert_same_training(found: dict, expected: dict) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert {name: found[name] for name in COUNTS} == {name: expected[name] for name in COUNTS}
    for metric in ("eval_loss", "eval_dropped_documents"):
        assert found["evaluation"][metric] == pytest.approx(expected["evaluation"][metric], rel=1e-5)


def assert_same_model(found: Path, expected: Path) -> None:
    """The same files with the same weights."""
    weights, expected_weights = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert set(weights) == set(expected_weights)
    for name, parameter in expected_weights.items():
        torch.testing.assert_close(weights[name], parameter, rtol=1e-4, atol=1e-5, msg=f"{found.parent.name} {name}")
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    assert (found / "config.json").read_text() == (expected / "config.json").read_text()
    AutoModelForImageTextToText.from_pretrained(found)


@pytest.mark.parametrize("launcher", ["ddp", "fsdp2"])
def test_two_processes_equal_one(folder, one, launcher):
    runs = {
        "mixture": SAVED,
        "resumed": {**SAVED, "resume": f"{launcher}/mixture/checkpoint-6"},
        "interrupted": {**SAVED, "stop": {"rank": 1, "step": 4}},
        "tower": TOWER,
        "bf16": BF16,
        "silent": SILENT,
    }
    two = launch(launcher, folder, runs)
    assert all(run["devices"] == 2 for run in two.values())
    packs = {name: json.loads((folder / name / "plan.json").read_text())["totals"]["packs"] for name in SOURCES}
    read = {name: 2 * round(epochs * packs[name]) for name, epochs in SOURCES.items()}
    assert sum(read.values()) // 2 % 4 != 0
    assert {name: source["packs"] for name, source in two["mixture"]["sources"].items()} == read
    for name in ("mixture", "tower", "silent"):
        assert_same_training(two[name], one[name])
        assert_same_model(folder / launcher / name / "model", folder / "one" / name / "model")
    assert_same_model(folder / launcher / "silent" / "model", folder / "one" / "loud" / "model")
    assert two["tower"]["dropped_documents"] == {"rank0": 6, "rank1": 6}

    # Resumed in the middle of the second epoch: not only close, but the same.
    assert two["resumed"]["losses"] == two["mixture"]["losses"]
    assert two["resumed"]["evaluation"]["eval_loss"] == two["mixture"]["evaluation"]["eval_loss"]
    assert {name: two["resumed"][name] for name in COUNTS} == {name: two["mixture"][name] for name in COUNTS}

    # One rank was asked to leave, and both did, after the step in which it was asked.
    assert [(rank["step"], rank["interrupted"]) for rank in two["interrupted"]["ranks"]] == [(5, True)] * 2
    assert newest_complete_checkpoint(folder / launcher / "interrupted").endswith("checkpoint-5")
    assert two["interrupted"]["losses"] == two["mixture"]["losses"][:5]

    # The loss is computed in bf16, whose values are 2**-8 apart, but not rounded to it; a frozen tower is whole on
    # each rank.
    assert two["bf16"]["losses"] == pytest.approx(one["bf16"]["losses"], rel=2**-8)
    assert any(loss != torch.tensor(loss).bfloat16().item() for loss in two["bf16"]["losses"])
    assert two["bf16"]["tower_dtypes"] == ["torch.bfloat16"]
    # Blocks add up in fp32 under autocast, and in bf16 where weights are gathered as that.
    assert two["bf16"]["stream"] == ["torch.bfloat16" if launcher == "fsdp2" else "torch.float32"]
    sharded = ["language_model", "projector"] if launcher == "fsdp2" else []
    assert two["mixture"]["sharded"] == two["bf16"]["sharded"] == sharded
    assert two["tower"]["sharded"] == (sharded and [*sharded, "vision_tower"])
    towers = [rank["tower"] for run in ("mixture", "resumed", "bf16") for rank in two[run]["ranks"]]
    assert towers[:4] == [one["mixture"]["ranks"][0]["tower"]] * 4 and towers[4] == towers[5]

    if launcher == "ddp":
        # On another number of processes.
        resumed = {"resume": "ddp/interrupted/checkpoint-5"}
        continued = run_here(folder, "continued", {"alone": SAVED | ALONE | resumed})["alone"]
        assert_same_training(continued, one["mixture"])
    else:
        assert (folder / "fsdp2" / "mixture" / "checkpoint-6" / "optimizer_0" / ".metadata").exists()
        with pytest.raises(ValueError, match="was trained with fsdp True, now False"):
            run_here(folder, "refused", {"alone": SAVED | ALONE | {"resume": "fsdp2/mixture/checkpoint-6"}})


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "fsdp2"])
def test_compiled_blocks_are_the_same_training(folder, one, launcher):
    """Beside sharding and activation checkpointing; the checkpoint resumes, and one process takes it as its own."""
    compiled = {**SAVED, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled["activation_checkpointing"] = True
    bf16 = {**BF16, "torch_compile": True, "torch_compile_backend": "aot_eager", "bf16_residual": True}
    pytest.importorskip("torchao", reason="needs the package torchao")
    two = launch(launcher, folder, {"compiled": compiled, "residual": bf16, "float8": {**bf16, "float8": True}})
    resumed = {**compiled, "resume": f"{launcher}/compiled/checkpoint-3"}
    two |= launch(launcher, folder, {"resumed": resumed})
    assert_same_training(two["compiled"], one["mixture"])
    assert_same_model(folder / launcher / "compiled" / "model", folder / "one" / "mixture" / "model")
    assert two["resumed"]["losses"] == two["compiled"]["losses"]
    assert two["residual"]["losses"] == pytest.approx(one["bf16"]["losses"], rel=2**-7)
    assert two["residual"]["stream"] == ["torch.bfloat16"]
    # Scaled by the largest number of each rank, in 3 bits.
    assert two["float8"]["losses"] == pytest.approx(one["bf16"]["losses"], rel=2e-2)
    assert two["float8"]["losses"] != two["residual"]["losses"]


@pytest.mark.slow
def test_fsdp2_goes_on_with_another_number_of_processes(folder):
    """Six packs a step: three micro-batches of two processes, then two of three, with activation checkpointing."""
    six = {**SAVED, "gradient_accumulation_steps": 3}
    whole = run_here(folder, "six", {"six": six | ALONE})["six"]
    launch("fsdp2", folder, {"six": {**six, "stop": {"rank": 0, "step": 3}}})
    (checkpoint,) = (folder / "fsdp2" / "six").glob("checkpoint-4")
    three = {**six, "gradient_accumulation_steps": 2, "resume": str(checkpoint)}
    continued = launch("fsdp2_three", folder, {"six": three})["six"]
    assert continued["devices"] == 3
    assert_same_training(continued, whole)
    assert_same_model(folder / "fsdp2_three" / "six" / "model", folder / "six" / "six" / "model")


@pytest.mark.slow
def test_hsdp_equals_one_process_and_goes_on_as_fsdp2(folder, one, monkeypatch):
    """Two shards on each of two machines; the same packs a step as elsewhere, two micro-batches of one on each."""
    config = yaml.safe_load((RECIPE.parent / "accelerate" / "hsdp_multinode.yaml").read_text())
    config |= {"use_cpu": True, "num_machines": 1, "num_processes": 4, "machine_rank": 0, "main_process_port": 0}
    config["parallelism_config"] = dict.fromkeys(config["parallelism_config"], 2)
    (folder / "hsdp.yaml").write_text(yaml.safe_dump(config))
    command = ["accelerate", "launch", "--config_file", str(folder / "hsdp.yaml")]
    monkeypatch.setitem(LAUNCHERS, "hsdp", command)
    eight = {**SAVED, "gradient_accumulation_steps": 2}
    whole = run_here(folder, "eight", {"eight": {**eight, "per_device_train_batch_size": 4}})["eight"]
    runs = {
        "eight": eight,
        "resumed": {**eight, "resume": "hsdp/eight/checkpoint-3"},
        "interrupted": {**eight, "stop": {"rank": 3, "step": 2}},
        "bf16": BF16 | {"gradient_accumulation_steps": 1},
    }
    four = launch("hsdp", folder, runs)
    assert {run["devices"] for run in four.values()} == {4}
    assert four["eight"]["sharded"] == ["language_model", "projector"]
    assert four["eight"]["placements"] == [["Replicate", "Shard"]]
    assert_same_training(four["eight"], whole)
    assert_same_model(folder / "hsdp" / "eight" / "model", folder / "eight" / "eight" / "model")
    assert four["resumed"]["losses"] == four["eight"]["losses"]
    assert four["interrupted"]["losses"] == four["eight"]["losses"][:3]
    assert four["bf16"]["losses"] == pytest.approx(one["bf16"]["losses"], rel=2**-8)
    # Two processes in one group.
    two = {**eight, "gradient_accumulation_steps": 4, "resume": "hsdp/interrupted/checkpoint-3"}
    continued = launch("fsdp2", folder, {"continued": two})["continued"]
    assert_same_training(continued, whole)
    assert_same_model(folder / "fsdp2" / "continued" / "model", folder / "eight" / "eight" / "model")


@pytest.mark.slow
def test_muon_on_shards_is_that_on_whole_matrices():
    run_script("ddp", SCRIPT.with_name("sharded_muon.py"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "fsdp2"])
def test_muon_average_and_background_writer_on_two_processes(folder, launcher):
    """Resumed from a checkpoint that was written beside training: the same, and its average is one process's."""
    state = {**SAVED, "optim": "muon", "ema_decay": 0.5, "async_save": True}
    runs = {"state": state, "state_resumed": {**state, "resume": f"{launcher}/state/checkpoint-6"}}
    runs["state_at_once"] = {**state, "async_save": False}
    two = launch(launcher, folder, runs)
    for name in ("state_resumed", "state_at_once"):
        assert two[name]["losses"] == two["state"]["losses"]
        assert two[name]["evaluation"]["eval_loss"] == two["state"]["evaluation"]["eval_loss"]
        weights = [load_file(folder / launcher / run / "model" / "model.safetensors") for run in ("state", name)]
        assert all(torch.equal(weights[1][key], tensor) for key, tensor in weights[0].items())
    for run in ("state", "state_at_once"):
        checkpoint = folder / launcher / run / "checkpoint-6"
        assert missing_part(checkpoint) is None and missing_part(checkpoint.with_name("checkpoint-8")) is None
        assert (checkpoint / "ema").is_dir() and not (checkpoint.parent / ".saving").exists()
    one = run_here(folder, f"one_{launcher}", {"state": state | ALONE})["state"]
    # The order of a sum may decide.
    assert two["state"]["losses"] == pytest.approx(one["losses"], rel=2e-3)
    assert two["state"]["evaluation"]["eval_loss"] == pytest.approx(one["evaluation"]["eval_loss"], rel=2e-3)


@pytest.mark.slow
def test_an_optimizer_that_knows_no_shards_is_refused(folder):
    with pytest.raises(AssertionError, match="optim adamw_8bit is bitsandbytes', which takes no shards"):
        launch("fsdp2", folder, {"refused": {**MIXTURE, "optim": "adamw_8bit"}})


@pytest.mark.slow
def test_benchmarks_during_training_on_two_processes(folder):
    """The ranks share the questions and train on as if there had been none; sharded weights are refused."""
    tasks = {"eval_tasks": "easyvqa_gen", "eval_tasks_steps": 2, "eval_tasks_limit": 5, "eval_tasks_batch_size": 2}
    tasks |= {"eval_tasks_path": str(write_tasks(folder / "tasks", 6)), "trust_task_code": True}
    two = launch("ddp", folder, {"plain": MIXTURE, "tasks": {**MIXTURE, **tasks}})
    scores = two["tasks"].pop("eval_tasks")
    assert two["tasks"]["losses"] == two["plain"]["losses"]
    assert {name: two["tasks"][name] for name in COUNTS} == {name: two["plain"][name] for name in COUNTS}
    (last,) = (folder / "ddp" / "tasks" / "eval_tasks").glob(f"step-{two['tasks']['steps']}")
    entry = json.loads((last / "results.json").read_text())["tasks"]["easyvqa_gen"]
    assert scores == {"eval_easyvqa_gen_exact_match": entry["metrics"]["exact_match"]["value"]}
    assert entry["num_samples"] == 5
    with pytest.raises(AssertionError, match="eval_tasks needs whole weights on each device"):
        launch("fsdp2", folder, {"tasks": {**MIXTURE, **tasks}})


def start_ranks(config: Path) -> list[subprocess.Popen]:
    """The recipe on two ranks without a launcher, so that the exit code of each can be seen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, str(RECIPE), str(config)],
            env={**ENVIRONMENT, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def wait_for(path: Path, ranks: list[subprocess.Popen]) -> None:
    while not path.exists():
        assert all(rank.poll() is None for rank in ranks), ranks[0].communicate()[1][-3000:]
        time.sleep(0.01)


@pytest.mark.slow
def test_a_changed_file_is_told_by_the_first_rank(folder, backbones, tmp_path):
    shutil.copytree(folder / "first-tars", tmp_path / "first-tars")
    shutil.copytree(folder / "first", tmp_path / "first")
    (tar,) = (tmp_path / "first-tars").iterdir()
    os.utime(tar, (0, 0))
    options = {f"{part}_model": path for part, path in backbones.items()}
    options |= {"train_packs": str(tmp_path / "first"), "output_dir": str(tmp_path / "run"), "use_cpu": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    ranks = start_ranks(tmp_path / "config.yaml")
    errors = [rank.communicate(timeout=1200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    assert "pretrain.py: error: " in errors[0] and "has changed since it was planned (mtime_ns" in errors[0]


@pytest.mark.slow
def test_ranks_leave_together(folder, backbones, monkeypatch):
    """SIGTERM to one rank, then SIGKILL to one rank, then one process to the end: the losses of a quiet run."""
    options = {f"{part}_model": path for part, path in backbones.items()} | {
        "train_packs": [{"path": str(folder / "first")}, {"path": str(folder / "second"), "weight": 1}],
        "output_dir": str(folder / "killed"),
        "gradient_accumulation_steps": 2,
        "max_steps": 60,
        "save_steps": 5,
        "logging_steps": 1,
        "dataloader_num_workers": 1,
        "use_cpu": True,
        # A fifth of `second` cannot be read.
        "max_dropped_share": 0.2,
    }
    options["train_packs"][0]["weight"] = 2
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(options))

    ranks = start_ranks(config)
    wait_for(folder / "killed" / "checkpoint-5", ranks)
    ranks[1].send_signal(signal.SIGTERM)
    errors = [rank.communicate(timeout=1200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143], errors
    stopped_at = int(newest_complete_checkpoint(folder / "killed").rpartition("-")[2])
    assert f"resumes from {folder / 'killed'}/checkpoint-{stopped_at}" in errors[0]

    ranks = start_ranks(config)
    wait_for(folder / "killed" / f"checkpoint-{stopped_at // 5 * 5 + 10}", ranks)
    ranks[1].kill()
    assert ranks[0].wait(timeout=1200) not in (0, 143)
    ranks[1].wait()

    def losses(output_dir: str) -> list[float]:
        monkeypatch.setattr(
            sys, "argv", ["pretrain.py", str(config), "--per_device_train_batch_size", "2", "--output_dir", output_dir]
        )
        runpy.run_path(str(RECIPE), run_name="__main__")
        state = json.loads((Path(output_dir) / "checkpoint-60" / "trainer_state.json").read_text())
        return [log["loss"] for log in state["log_history"] if "loss" in log]

    assert losses(str(folder / "killed")) == pytest.approx(losses(str(folder / "quiet")), rel=1e-5)
