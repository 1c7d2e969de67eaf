"""`make gpu-check` runs as a whole where there is no GPU; what dies, hangs or is wrong is recorded by its name."""

import os
import subprocess
import sys
import textwrap
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOGETHER = "fastest packs and lever"  # skipped where one of them is what was measured first


@pytest.fixture(scope="module")
def gpu_check():
    """The modules of benchmarks/gpu_check/."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from gpu_check import __main__, attention, models, right, running, steps, table, waits
    finally:
        sys.path.remove(str(BENCHMARKS))
    names = (__main__, attention, models, right, running, steps, table, waits)
    return SimpleNamespace(main=__main__, **{module.__name__.rpartition(".")[2]: module for module in names[1:]})


@pytest.fixture(scope="module")
def bench(gpu_check, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_check")
    return gpu_check.models.Bench("tiny", folder, folder / "gpu.json", workers=0)


def run_all(gpu_check, bench, left_out=()):
    """Every case of every stage, here."""
    record = gpu_check.running.Record.read(bench.record)
    record.begin(gpu_check.main.describe_machine("tiny"))
    for name, stage in gpu_check.main.STAGES.items():
        for case, run in stage.cases.items():
            if case not in left_out:
                record.settle(name, case, gpu_check.running.run_case(run, bench))
    torch._dynamo.reset()
    return record


def not_done(record) -> dict:
    return {
        (stage, case): outcome
        for stage, cases in record.stages.items()
        for case, outcome in cases.items()
        if "done" not in outcome
    }


def test_every_stage_runs_on_a_cpu(gpu_check, bench):
    """But for combinations of levers, and compiled float8, which the slow test has."""
    steps = gpu_check.steps
    together = [case for case in (*steps.LEVERS, *steps.FP8) if "," in case]
    record = run_all(gpu_check, bench, {*together, *(steps.GRADIENTS + case for case in together)})
    skipped = not_done(record)
    assert {case for _, case in skipped} <= {"use_liger_kernel", "gradients with use_liger_kernel", TOGETHER}, skipped
    attention = ("attention: varlen, flash", "attention: varlen, shared pictures")
    for case in (*attention, "packed step", "gradients with bf16_residual", "gradients with torch_compile"):
        assert record.of("right", case)["done"]["right"] is True
    assert record.of("step", "2 packs")["done"]["tokens/s"] > 0
    assert 0 <= record.of("loader", "loading beside computing, accumulation 128")["done"]["waiting"] <= 1
    assert record.of("waits", "an optimizer step")["done"]["micro-batches"] == 2

    text = "\n".join(gpu_check.table.report(record, gpu_check.main.STAGES, bench))
    (row,) = [line.split(" | ") for line in text.splitlines() if line.startswith("| 1 pack |")]
    assert float(row[1]) > 0 and float(row[2]) > 0 and float(row[5]) > 1, "ms, predicted and measured; predicted GiB"
    assert "```yaml\nper_device_train_batch_size: " in text, "what won"


def test_without_a_gpu_the_report_has_predictions_alone(gpu_check, bench):
    record = gpu_check.running.Record(bench.record)
    text = "\n".join(gpu_check.table.report(record, {"step": gpu_check.main.STAGES["step"]}, bench))
    assert "No GPU has run this" in text
    (row,) = [line.split(" | ") for line in text.splitlines() if line.startswith("| 1 pack |")]
    assert float(row[1]) > 0 and not row[2].strip()


@pytest.mark.slow
def test_levers_go_together(gpu_check, tmp_path):
    record = run_all(gpu_check, gpu_check.models.Bench("tiny", tmp_path, tmp_path / "gpu.json", workers=1))
    skipped = not_done(record)
    assert all("liger" in case or case == TOGETHER for _, case in skipped), skipped
    assert record.of("levers", "torch_compile, bf16_residual")["done"]["tokens/s"] > 0
    assert record.of("fp8", "gradients with float8, torch_compile, bf16_residual")["done"]["right"] is True


def test_the_budgets_leave_room_within_ten_minutes(gpu_check):
    """For a process that starts and one that writes the report."""
    assert sum(stage.budget for stage in gpu_check.main.STAGES.values()) <= 570


def test_documents_that_see_each_other_are_wrong(gpu_check, bench, monkeypatch):
    """The check can fail: attention over the whole pack is no packed attention."""
    original = AttentionInterface()["packed_varlen"]

    def leaking(module, query, key, value, mask, cu_seq_lens_q=None, **kwargs):
        whole = torch.tensor([0, query.shape[0] * query.shape[2]], dtype=torch.int32)
        bounds = None if cu_seq_lens_q is None else whole
        return original(module, query, key, value, mask, cu_seq_lens_q=bounds, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "packed_varlen", leaking)
    assert gpu_check.right.compare(bench, {})["right"] is False


def test_a_wrong_lever_does_not_win(gpu_check, tmp_path):
    record = gpu_check.running.Record(tmp_path / "gpu.json")
    record.settle("step", "1 pack", {"done": {"tokens/s": 1.0}})
    record.settle("levers", "torch_compile", {"done": {"tokens/s": 2.0}})
    groups = {"step": gpu_check.steps.PACKS, "levers": gpu_check.steps.LEVERS}
    assert gpu_check.steps.fastest(record, groups) == "1 pack", "nobody looked at its gradients"
    record.settle("right", "gradients with torch_compile", {"done": {"right": False}})
    assert gpu_check.steps.fastest(record, groups) == "1 pack"
    record.settle("right", "gradients with torch_compile", {"done": {"right": True}})
    assert gpu_check.steps.fastest(record, groups) == "torch_compile"


def test_a_wait_is_counted_for_our_line(gpu_check):
    def line_of_ours():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    found = Counter()
    with gpu_check.waits.recorded_waits(found):
        line_of_ours()
        line_of_ours()
        warnings.warn("something else", stacklevel=1)
    ((line, times),) = found.items()
    assert times == 2 and "test_gpu_check.py" in line and "warnings.warn" in line


# A stage's process without what takes ten seconds to import: three cases, the second of which does as it is told.
CHILD = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from gpu_check.running import Record, Skip, Stage, run_cases

def second(bench):
    if sys.argv[3] == "die":
        os._exit(3)
    while sys.argv[3] == "hang":
        time.sleep(1)
    raise Skip("not here")

cases = {"first": lambda bench: {"pid": os.getpid()}, "second": second, "third": lambda bench: {"pid": os.getpid()}}
run_cases(Record.read(Path(sys.argv[2])), "stage", Stage("", 1, cases), None)
"""


@pytest.fixture
def run(gpu_check, tmp_path):
    """Runs the stage of [`CHILD`] in processes and returns its record."""
    script, cases = tmp_path / "child.py", dict.fromkeys(("first", "second", "third"))
    script.write_text(textwrap.dedent(CHILD))

    def run(behaviour: str, budget: float):
        path = tmp_path / "gpu.json"
        command = [sys.executable, str(script), str(BENCHMARKS), str(path), behaviour]
        stage = gpu_check.running.Stage("", 1, cases)
        return gpu_check.running.run_stage(path, "stage", stage, command, tmp_path / "log", budget)

    return run


def test_a_process_that_dies_takes_one_case_with_it(run):
    record = run("die", 600)
    assert record.of("stage", "second")["failed"].startswith("its process ended with 3")
    pids = [record.of("stage", case)["done"]["pid"] for case in ("first", "third")]
    assert pids[0] != pids[1]


def test_a_stage_that_hangs_is_ended_and_tried_again(run, gpu_check):
    record = run("hang", 5)
    assert record.of("stage", "second") in ({"failed": "over the stage's 5 s"}, {"skipped": "no time was left"})
    assert record.of("stage", "third") == {"skipped": "no time was left"}
    record.begin({"card": "A", "model": "2B", "torch": "2"})
    before = record.of("stage", "first")
    record = run("skip", 600)
    assert record.of("stage", "first") == before or not before
    assert record.of("stage", "second") == {"skipped": "not here"}
    assert record.of("stage", "third")["done"]
    with pytest.raises(ValueError, match="is of card A, and this is B"):
        record.begin({"card": "B", "model": "2B", "torch": "2"})


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "gpu_check", "--tiny", "--stages", "step", "rates"]
    command += ["--output", tmp_path / "gpu.md", "--folder", tmp_path / "work"]
    path = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "gpu.md").read_text()
    (row,) = [line.split(" | ") for line in text.splitlines() if line.startswith("| 4 packs |")]
    assert float(row[7].replace(",", "")) > 0, "tokens/s"
    assert "| bf16 products |" in text and (tmp_path / "gpu.json").exists()
