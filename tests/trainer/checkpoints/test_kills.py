"""Killed at random moments and started again: the very same losses, weights and counts as an undisturbed run."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from open_qwen2vl import OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor, cli
from open_qwen2vl.trainer.checkpoints.completeness import missing_part
from open_qwen2vl.trainer.checkpoints.folders import checkpoints_by_step, newest_complete_checkpoint
from tests.fork_server import fork_program, has_ended
from tests.qwen_vl import FAMILIES
from tests.tars import write_caption_tar

SCRIPT = Path(__file__).with_name("killed_run.py")
ARGUMENTS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "learning_rate": 2e-3,
    "weight_decay": 0.1,
    "dataloader_num_workers": 0,
    "logging_steps": 3,
    "save_steps": 4,
    "save_total_limit": 2,
    "projector_learning_rate": 4e-3,
}


class Runs:
    """Lives of a training, each in a process of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def live(
        self, output_dir: Path, packs=None, seconds=0.0, sign=signal.SIGKILL, file_limit=0, config="config"
    ) -> int:
        """One life; `sign` comes `seconds` after it has read `packs`, if at all. Returns the exit code."""
        notes = output_dir / "reads.txt"
        before = count_lines(notes)
        child = self.start(output_dir, config, file_limit)
        if packs is not None:
            while count_lines(notes) < before + packs and not has_ended(child):
                time.sleep(0.002)
            time.sleep(seconds)
            os.kill(child, sign)  # nothing, if it has come to its end
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def start(self, output_dir: Path, config="config", file_limit=0) -> int:
        log, variables = output_dir.with_name(f"{output_dir.name}.log"), {"TOKENIZERS_PARALLELISM": "false"}
        arguments = [SCRIPT, self.folder / f"{config}.json", output_dir]
        return fork_program("python", *arguments, log=log, environment=variables, file_limit=file_limit)

    def config(self, name: str, **changes) -> str:
        """Another config: the same but for some `arguments`, or with `held`."""
        settings = json.loads((self.folder / "config.json").read_text())
        held = {"held": changes.pop("held")} if "held" in changes else {}
        settings = {**settings, **held, "arguments": {**settings["arguments"], **changes}}
        (self.folder / f"{name}.json").write_text(json.dumps(settings))
        return name


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def save_open_qwen2vl(folder: Path, backbones: dict[str, str]) -> Path:
    torch.manual_seed(0)
    for part in (OpenQwen2VLForConditionalGeneration, OpenQwen2VLProcessor):
        part.from_vision_text_pretrained(**backbones, image_seq_length=4).save_pretrained(folder)
    return folder


@pytest.fixture(
    scope="module", params=["open_qwen2vl", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES)]
)
def runs(request, tmp_path_factory, backbones, qwen_vl_folder):
    """Lives on a mixture of two plans made from real tars, and a finished undisturbed one in `whole`."""
    folder, ours = tmp_path_factory.mktemp("kills"), request.param == "open_qwen2vl"
    model = save_open_qwen2vl(folder / "model", backbones) if ours else qwen_vl_folder(request.param)
    sizes = ["--image-seq-length", "4", "--max-length", "48"] if ours else ["--max-length", "64"]
    rng = random.Random(0)
    packs = []
    for name, count, weight in (("dogs", 60, 2), ("cats", 40, 1)):
        captions = [
            " ".join(rng.choices(["a", "photo", "of", "two", name], k=rng.randint(1, 12))) for _ in range(count)
        ]
        write_caption_tar(folder / f"{name}.tar", captions, size=(24, 40) if ours else (count, 90))
        plan = ["--output", str(folder / name), *sizes, "--num-workers", "1"]
        assert cli.main(["pack", str(folder / f"{name}.tar"), "--processor", str(model), *plan]) == 0
        packs.append({"path": str(folder / name), "weight": weight})
    arguments = ARGUMENTS if ours else ARGUMENTS | {"train_vision_tower": True}
    (folder / "config.json").write_text(json.dumps({"packs": packs, "model": str(model), "arguments": arguments}))
    runs = Runs(folder)
    assert runs.live(folder / "whole") == 0, (folder / "whole.log").read_text()
    return runs


def history(run: Path) -> list[dict]:
    newest = list(checkpoints_by_step(run).values())[-1]
    kept = ("step", "loss", "grad_norm", "learning_rate", "loss/dogs", "loss/cats", "share/dogs", "fill", "epoch")
    logs = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [{name: log[name] for name in kept if name in log} for log in logs if "loss" in log]


def assert_same(run: Path, whole: Path) -> None:
    assert history(run) == history(whole) and len(history(whole)) > 5
    assert "loss/cats" in history(whole)[-1]
    assert (run / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    found, expected = (json.loads((folder / "train_results.json").read_text()) for folder in (run, whole))
    for name in ("steps", "tokens", "positions", "documents", "images", "flops", "final_loss", "sources"):
        assert found[name] == expected[name], name
    left = {path.name for path in run.iterdir()} - {f"checkpoint-{step}" for step in checkpoints_by_step(run)}
    assert left == {"README.md", "loss.png", "model", "reads.txt", "train_results.json"}
    assert len(checkpoints_by_step(run)) == ARGUMENTS["save_total_limit"]


def reads(run: Path) -> list[list[int]]:
    """Packs read in each life."""
    lives: dict[str, list[int]] = {}
    for line in (run / "reads.txt").read_text().splitlines():
        process, pack = line.split()
        lives.setdefault(process, []).append(int(pack))
    return list(lives.values())


def test_a_kill_a_sigterm_and_a_full_disk(runs):
    run, whole = runs.folder / "few", runs.folder / "whole"
    (order,) = reads(whole)
    third = len(order) // 3
    assert runs.live(run, packs=third) == -signal.SIGKILL
    assert runs.live(run, file_limit=20_000) == 1
    assert "cannot save" in (runs.folder / "few.log").read_text()
    assert runs.live(run, packs=third, sign=signal.SIGTERM) == 128 + signal.SIGTERM
    assert "stopped on request; the same command resumes from" in (runs.folder / "few.log").read_text()
    assert runs.live(run) == 0
    assert_same(run, whole)
    # The last life begins where the newest checkpoint stood and reads nothing that came before.
    last = reads(run)[-1]
    assert last == order[len(order) - len(last) :] and len(last) < len(order)


@pytest.mark.slow
def test_kills_while_a_thread_writes(runs):
    """A checkpoint that is written but has no name yet is none; then kills and full disks at random moments."""
    run, whole = runs.folder / "beside", runs.folder / "whole"
    child = runs.start(run, runs.config("held", async_save=True, held="checkpoint-8"))
    while not (run / "held").exists():
        assert not has_ended(child), (runs.folder / "beside.log").read_text()[-3000:]
        time.sleep(0.01)
    assert missing_part(run / ".saving" / "checkpoint-8") is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (run / "held").unlink()
    assert newest_complete_checkpoint(run) == str(run / "checkpoint-4")

    config, rng = runs.config("async", async_save=True), random.Random(2)
    for _ in range(4):
        assert runs.live(run, rng.randrange(24), rng.uniform(0, 0.2), config=config) in (0, -signal.SIGKILL)
        assert runs.live(run, file_limit=rng.choice([2_000, 20_000, 60_000]), config=config) in (0, 1)
        assert runs.live(run, rng.randrange(24), 0, signal.SIGTERM, config=config) in (0, 143, -signal.SIGTERM)
    while runs.live(run, config=config) != 0:
        pass
    assert_same(run, whole)


@pytest.mark.slow
def test_many_kills_at_random_moments(runs):
    run, whole = runs.folder / "many", runs.folder / "whole"
    rng = random.Random(1)
    kinds = {"SIGKILL": 0, "SIGTERM": 0, "full disk": 0}
    total, lives = 0, 0
    while total < 30:
        lives += 1
        assert lives < 500, kinds
        kind = rng.choice(list(kinds))
        if kind == "full disk":
            code = runs.live(run, file_limit=rng.choice([2_000, 20_000, 60_000]))
            hit = code == 1
        else:
            packs, seconds = rng.randrange(len(reads(whole)[0]) // 2), rng.uniform(0, 0.2)
            code = runs.live(run, packs, seconds, getattr(signal, kind))
            hit = code in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM)
        kinds[kind] += hit
        total += hit
        assert hit or code == 0, (runs.folder / "many.log").read_text()[-3000:]
        if code == 0 and total < 30:
            # It came to its end: keep the comparison, and begin anew for the rest of the kills.
            assert_same(run, whole)
            run = run.with_name(f"many{lives}")
    while runs.live(run) != 0:
        pass
    assert_same(run, whole)
    assert min(kinds.values()) >= 5, kinds
