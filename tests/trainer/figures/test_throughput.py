import json
import time
from pathlib import Path

import pytest
import torch

from open_qwen2vl.trainer.figures.progress import progress_figures, summary_lines
from open_qwen2vl.trainer.figures.steps import Step
from open_qwen2vl.trainer.figures.throughput import ThroughputCallback, rates

CPU = torch.device("cpu")


def make_step(number=1, loss=2.0, tokens=100, sources=((3.0, 2, 60), (9.0, 3, 40))) -> Step:
    counts = {"tokens": tokens, "positions": 125, "documents": 3, "images": 2, "flops": 5 * 10**15, "data_wait": 0.1}
    return Step(
        number,
        loss=loss,
        counts={**counts, "dropped": 0},
        source_losses=[loss for loss, _, _ in sources],
        sources=[{"labels": labels, "tokens": tokens, "packs": 1} for _, labels, tokens in sources],
    )


def test_rates_are_per_second_and_per_device():
    work = {"tokens": 8000, "positions": 10000, "images": 40, "flops": 6 * 10**12, "data_wait": 0.6}
    assert rates(work, 2.0, CPU, 3) == {
        "tokens_per_second": 4000,
        "images_per_second": 20,
        "tflops_per_second": pytest.approx(1.0),
        "data_wait": pytest.approx(0.1),
        "fill": 0.8,
    }


def test_a_window_holds_the_steps_since_the_last_log():
    callback = ThroughputCallback()
    callback.add(make_step(1, loss=2.0))
    callback.add(make_step(2, loss=1.0))
    first = callback.close_window(CPU, 1, ["a", "b"])
    callback.add(make_step(3, loss=5.0, sources=((0.0, 0, 0), (8.0, 4, 100))))
    second = callback.close_window(CPU, 1, ["a", "b"])
    assert (first["loss"], second["loss"]) == (1.5, 5.0)
    assert first["tokens_per_second"] * callback.totals["seconds"] >= 200
    assert first["fill"] == 0.8
    assert (first["loss/a"], first["loss/b"], second["loss/b"]) == (1.5, 3.0, 2.0)
    assert "loss/a" not in second  # no labels of it
    assert (first["share/a"], second["share/a"]) == (0.6, 0.4)
    assert callback.totals["tokens"] == 300 and callback.totals["flops"] == 15 * 10**15
    assert callback.sources[1] == {"labels": 10, "tokens": 180, "packs": 3}


def test_one_source_needs_no_figures_of_its_own():
    callback = ThroughputCallback()
    callback.add(make_step(sources=((3.0, 2, 100),)))
    assert not [name for name in callback.close_window(CPU, 1, ["packs"]) if "/" in name]


def test_an_interrupted_window_goes_on_from_its_state():
    whole, cut, resumed = ThroughputCallback(), ThroughputCallback(), ThroughputCallback()
    steps = [make_step(number, loss=1 / number) for number in range(1, 5)]
    for step in steps:
        whole.add(step)
    for step in steps[:3]:
        cut.add(step)
    for name, value in json.loads(json.dumps(cut.state()))["attributes"].items():
        setattr(resumed, name, value)
    resumed.add(steps[3])
    expected, found = (callback.close_window(CPU, 1, ["a", "b"]) for callback in (whole, resumed))
    for name in ("loss", "loss/a", "loss/b", "share/a", "fill"):
        assert found[name] == expected[name], name


class SlowPacks(list):
    """Packs that take 0.15 s each to read."""

    def __getitem__(self, index):
        time.sleep(0.15)
        return super().__getitem__(index)


def test_every_log_has_the_figures_and_evaluation_is_not_in_them(make_trainer, packs):
    trainer = make_trainer(
        eval_dataset=SlowPacks(packs), eval_strategy="steps", eval_steps=2, logging_steps=4, max_steps=4
    )
    output = trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [4]
    for log in logs:
        assert log["tokens_per_second"] > 0 and log["images_per_second"] > 0 and log["tflops_per_second"] > 0
        assert log["dropped_documents"] == 0 and "mfu" not in log
        assert 0 < log["fill"] <= 1 and 0 <= log["data_wait"] < 0.9
    # Two evaluations of eight packs.
    assert output.metrics["train_runtime"] - logs[-1]["train_seconds"] >= 2 * 8 * 0.15


def test_waiting_for_data_is_part_of_the_window_and_named(make_trainer, packs):
    trainer = make_trainer(train_dataset=SlowPacks(packs), logging_steps=2, max_steps=4)
    trainer.train()
    summary = trainer.summary()
    assert summary["train_seconds"] >= 4 * 0.15
    assert summary["data_wait"] * summary["train_seconds"] >= 4 * 0.15


def test_the_bar_shows_the_figures_instead_of_dicts(make_trainer, packs, capsys):
    trainer = make_trainer(eval_dataset=packs, eval_strategy="steps", eval_steps=2, disable_tqdm=False)
    trainer.train()
    printed = capsys.readouterr()
    assert "tok/s" in printed.err and "img/s" in printed.err and "TFLOP/s" in printed.err and "4/4" in printed.err
    assert "step 2: eval loss" in printed.err
    assert "{" not in printed.out + printed.err


def test_lines_of_figures():
    logs = {
        "loss": 2.34567,
        "tokens_per_second": 12345.6,
        "images_per_second": 78.9,
        "tflops_per_second": 371.4,
        "mfu": 0.3755,
        "data_wait": 0.01,
        "dropped_documents": 2,
    }
    assert progress_figures(logs) == "loss 2.3457, 12,346 tok/s, 78.9 img/s, 371 TFLOP/s, MFU 37.5%, 2 dropped"
    assert progress_figures({**logs, "data_wait": 0.25}).endswith("waits 25%, 2 dropped")


def test_the_summary_is_printable_and_json(make_trainer, packs, tmp_path):
    trainer = make_trainer(train_dataset=[{**pack, "dropped": {"corrupt_image": 1}} for pack in packs])
    trainer.train()
    summary = trainer.summary()
    assert "4 corrupt_image" in summary_lines(summary) and f"{summary['final_loss']:.4f}" in summary_lines(summary)
    trainer.save_metrics("train", summary, combined=False)
    assert json.loads((Path(trainer.args.output_dir) / "train_results.json").read_text()) == summary
