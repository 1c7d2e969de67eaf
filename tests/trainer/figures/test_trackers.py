"""`report_to`: what a run logs arrives in the tracker, every figure of it."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from open_qwen2vl.data import PackMixture, parse_sources, plan_packs
from tests.tars import write_caption_tar

FIGURES = {"loss", "grad_norm", "learning_rate", "tokens_per_second", "data_wait", "fill"}


@pytest.fixture
def mixture(tmp_path, processor):
    """Two sources, so that each has a loss of its own."""
    for number, name in enumerate(("cats", "dogs")):
        write_caption_tar(tmp_path / f"{name}.tar", [f"{name} " * (i % 4 + 1) for i in range(12)], seed=number)
        options = {"image_seq_length": 4, "max_length": 48, "num_workers": 1}
        plan_packs([tmp_path / f"{name}.tar"], tmp_path / name, processor.tokenizer, **options)
    return PackMixture(parse_sources([{"path": str(tmp_path / "cats")}, {"path": str(tmp_path / "dogs")}]), processor)


def logged(trainer):
    """Keys of the training logs with their last values."""
    figures = {}
    for log in trainer.state.log_history:
        if "loss" in log:
            figures.update(log)
    assert figures.keys() >= FIGURES | {"loss/cats", "loss/dogs"}, figures
    return {name: value for name, value in figures.items() if name not in ("step", "epoch")}


def test_tensorboard_has_every_figure(make_trainer, mixture):
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    trainer = make_trainer(train_dataset=mixture, report_to=["tensorboard"], per_device_train_batch_size=2)
    trainer.train()
    folders = {path.parent for path in Path(trainer.args.output_dir).rglob("events.out.tfevents.*")}
    assert len(folders) == 1
    events = accumulator.EventAccumulator(str(folders.pop()))
    events.Reload()
    for name, value in logged(trainer).items():
        assert events.Scalars(f"train/{name}")[-1].value == pytest.approx(value, rel=1e-6), name


def test_trackio_has_every_figure(make_trainer, mixture, monkeypatch, tmp_path):
    from trackio import sqlite_storage

    # Its environment variable counts only before the first import, which may have been in another test.
    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    trainer = make_trainer(
        train_dataset=mixture,
        report_to=["trackio"],
        per_device_train_batch_size=2,
        project="packs",
        run_name="run",
        trackio_static_space_id=False,
    )
    trainer.train()
    (database,) = (tmp_path / "trackio").glob("packs*.db")
    with closing(sqlite3.connect(database)) as connection:
        rows = [json.loads(row) for (row,) in connection.execute("SELECT metrics FROM metrics ORDER BY step")]
    stored = {name: value for row in rows if "train/loss" in row for name, value in row.items()}
    for name, value in logged(trainer).items():
        assert stored[f"train/{name}"] == pytest.approx(value), name
