"""The command: proxies on drawn mixtures, a proposal that follows their losses, reruns, and what is refused."""

import contextlib
import gc
import json
import shutil

import pytest
import yaml

from open_qwen2vl import PackedTrainer, cli
from open_qwen2vl.data import parse_sources
from tests.data.killed_step import read_folder


def mix(file, output, *options) -> int:
    return cli.main(["mix", str(file), "--output", str(output), *map(str, options)])


@pytest.fixture(scope="module")
def searched(sources_file, tmp_path_factory):
    """From another folder than that of the recipes."""
    output = tmp_path_factory.mktemp("searched") / "mix"
    with contextlib.chdir(output.parent):
        assert mix(sources_file, output, "--proxies", 5) == 0
    return output


def test_the_source_that_is_close_gets_the_weight(searched, sources_file):
    report = json.loads((searched / "report.json").read_text())
    weights = {name: found["weight"] for name, found in report["weights"].items()}
    assert weights["near"] > 0.8 and sum(weights.values()) == pytest.approx(1)
    for found in report["weights"].values():
        assert found["low"] <= found["weight"] + 1e-3 and found["weight"] <= found["high"] + 1e-3
    foretold = {name: found["loss"] for name, found in report["foretold"].items()}
    assert foretold["proposal"] < foretold["all alike"] < foretold["noise alone"]
    assert [sum(proxy["weights"].values()) for proxy in report["proxies"]] == [pytest.approx(1)] * 5
    assert report["proxies"][0]["weights"] == {"near": 0.5, "noise": 0.5}, "the mean of the prior comes first"
    # What is written is a recipe: that of the proxies, with the weights.
    proposed, given = (yaml.safe_load(path.read_text()) for path in (searched / "mixture.yaml", sources_file))
    assert {source.name: source.weight for source in parse_sources(proposed.pop("train_packs"))} == weights
    assert proposed == {name: value for name, value in given.items() if name != "train_packs"}
    page = (searched / "report.html").read_text()
    assert "near" in page and "data:image/png" in page and "on left-out" not in page
    assert sorted(path.name for path in (searched / "proxies").iterdir()) == [f"{i:04}-42.json" for i in range(5)]


def trainers_in_memory() -> int:
    """Those included that wait for the garbage collector."""
    return sum(type(one) is PackedTrainer for one in gc.get_objects())


def test_a_rerun_trains_what_is_missing_to_the_same_bytes(searched, sources_file, tmp_path, capfd):
    """A proxy that was killed has no record, and a folder that is half there."""
    cut = tmp_path / "mix"
    shutil.copytree(searched, cut)
    (cut / "proxies" / "0002-42.json").unlink()
    (cut / "report.html").unlink()
    (cut / "proxies" / "0002-42").mkdir()
    (cut / "proxies" / "0002-42" / "log.txt").write_text("half a li")
    gc.collect()
    before = trainers_in_memory()
    assert mix(sources_file, cut, "--proxies", 5) == 0
    assert trainers_in_memory() == before, "a worker would fill the memory with what it has trained"
    assert read_folder(cut) == read_folder(searched)
    told = capfd.readouterr()
    assert "proxies    5" in told.out and "weight     near: " in told.out and "5/5" in told.err


def test_a_training_that_stops_is_counted_and_left_out(searched, sources_file, tmp_path, capfd):
    cut = tmp_path / "mix"
    shutil.copytree(searched, cut)
    failed = {"weights": {"near": 0.5, "noise": 0.5}, "seed": 0, "failed": "pretrain.py: error: the loss is nan"}
    (cut / "proxies" / "0000-42.json").write_text(json.dumps(failed))
    assert mix(sources_file, cut, "--proxies", 5) == 2
    assert "1 of 5 proxies failed, too many for a fit: pretrain.py: error: the loss" in capfd.readouterr().err


def change(file, folder, **options):
    """SOURCES.yaml with other options; None takes one out."""
    found = {**yaml.safe_load(file.read_text()), **options}
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in found.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, ["--proxies", 4], "--proxies must be at least 5 for 2 sources"),
        ({}, ["--recipe", "nowhere.py"], "--recipe nowhere.py does not exist"),
        ({}, ["--target", "pairs=1"], "no domain 'pairs' in eval_packs; there are held-out"),
        ({}, ["--target", "held-out=0"], "--target: the weights sum to nothing"),
        ({}, ["--target", "held-out=much"], "a weight is a number that is not negative"),
        ({}, ["--concentration", 0], "--concentration must be above 0"),
        ({"max_steps": None}, [], "max_steps (or --steps) says how long a proxy trains"),
        ({"eval_packs": None}, [], "options of a training with train_packs and eval_packs are needed"),
        ({"train_packs": "somewhere"}, [], "train_packs must list two sources at least"),
        ({"push_to_hub": True}, [], "push_to_hub is not for proxies"),
        ({"learning_rat": 1}, [], "unknown option 'learning_rat' (did you mean 'learning_rate'?)"),
        ({"max_steps": 3}, ["--output", "{searched}", "--seed", 1], "made with --seed 0, now 1, max_steps 2, now 3"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(searched, sources_file, tmp_path, capfd, changes, options, message):
    before = read_folder(searched)
    options = [str(option).format(searched=searched) for option in options]
    assert mix(change(sources_file, tmp_path, **changes), tmp_path / "mix", *options) == 2
    (error,) = (line for line in capfd.readouterr().err.splitlines() if "error:" in line)
    assert error.startswith("open-qwen2vl mix: error: ") and message in error
    assert read_folder(searched) == before


@pytest.mark.parametrize(("key", "value"), [("weight", {0: 1, 1: 2}), ("phase", 1), ("epochs", 2)])
def test_sources_with_a_plan_of_their_own_are_refused(sources_file, tmp_path, capfd, key, value):
    entries = [{**entry, key: value} for entry in yaml.safe_load(sources_file.read_text())["train_packs"]]
    assert mix(change(sources_file, tmp_path, train_packs=entries), tmp_path / "mix") == 2
    assert "weights are looked for, so that train_packs take no schedule, epochs or phase" in capfd.readouterr().err
