import gzip
import json
import logging
from pathlib import Path

from open_qwen2vl.trainer.figures.profiling import ProfileCallback


def step_names(trace):
    return {event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep#")}


def folder_of(trainer):
    return Path(trainer.args.output_dir) / "profile"


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_three_steps_are_recorded_and_the_run_goes_on_as_without(make_trainer):
    trainer, plain = make_trainer(profile=True, max_steps=7), make_trainer(max_steps=7)
    for each in (trainer, plain):
        each.train()
    assert losses(trainer) == losses(plain) and len(losses(plain)) == 7
    folder = folder_of(trainer)
    assert {path.name for path in folder.iterdir()} == {"trace-rank0.json.gz", "operators.txt"}
    trace = json.loads(gzip.decompress((folder / "trace-rank0.json.gz").read_bytes()))
    assert step_names(trace) == {"ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"}
    assert any("backward" in event["name"].lower() for event in trace["traceEvents"])
    table = (folder / "operators.txt").read_text()
    assert "Self CPU" in table and "aten::mm" in table


def test_a_run_that_ends_early_writes_what_it_has_and_says_so(make_trainer, caplog):
    trainer = make_trainer(callbacks=[ProfileCallback(wait=0, warmup=1, active=3)], max_steps=3)
    with caplog.at_level(logging.WARNING, "open_qwen2vl"):
        trainer.train()
    trace = json.loads(gzip.decompress((folder_of(trainer) / "trace-rank0.json.gz").read_bytes()))
    assert "ProfilerStep#2" in step_names(trace)
    assert "it takes 4 steps, and this run made 3" in caplog.text


def test_a_run_too_short_for_the_first_recorded_step_writes_nothing(make_trainer, caplog):
    trainer = make_trainer(profile=True, max_steps=2)
    trainer.train()
    assert list(folder_of(trainer).iterdir()) == [] and "incomplete" in caplog.text
