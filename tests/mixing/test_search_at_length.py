"""A search whose answer is known: noise, few sentences of the held-out kind, and many that share its words."""

import itertools
import json
import random

import pytest
import yaml

from tests.data.killed_step import OUTPUT, check_killed_step, read_folder
from tests.mixing.conftest import RECIPE
from tests.mixing.test_search import mix

ADJECTIVES = "small large red green old quick quiet bright".split()
NOUNS = "dog cat bird horse fox cow fish bear wolf hen frog goat".split()
VERBS = "runs sleeps eats jumps sits swims sings waits".split()
PLACES = "park house river field forest garden street barn".split()


@pytest.fixture(scope="module")
def grammar_file(tmp_path_factory, text_plan, backbones):
    folder, rng = tmp_path_factory.mktemp("grammar"), random.Random(0)
    sentences = [f"a {a} {n} {v} in the {p}" for a, n, v, p in itertools.product(ADJECTIVES, NOUNS, VERBS, PLACES)]
    rng.shuffle(sentences)
    related = [f"the {p} has a {n} that {v}" for p, n, v in itertools.product(PLACES, NOUNS, VERBS)]
    related += [f"{n} is {a}" for a, n in itertools.product(ADJECTIVES, NOUNS)]
    noise = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=30)) for _ in range(400)]
    options = {
        "vision_model": backbones["vision"],
        "text_model": backbones["text"],
        "train_packs": [
            text_plan(folder, "near", sentences[:24]),
            text_plan(folder, "related", related),
            text_plan(folder, "noise", noise),
        ],
        "eval_packs": [text_plan(folder, "held-out", sentences[-60:])],
        "per_device_train_batch_size": 4,
        "max_steps": 80,
        "learning_rate": 5e-3,
        "warmup_steps": 0.1,
        "dataloader_num_workers": 0,
        "use_cpu": True,
    }
    path = folder / "sources.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


@pytest.mark.slow
def test_the_proposal_beats_uniform_and_each_source_alone(grammar_file, tmp_path):
    """As trained, with seeds that the search has not seen."""
    assert mix(grammar_file, tmp_path / "mix", "--proxies", 20, "--check-seeds", 3) == 0
    report = json.loads((tmp_path / "mix" / "report.json").read_text())
    weights = {name: found["weight"] for name, found in report["weights"].items()}
    assert weights["noise"] < 0.1
    trained = {name: sum(values) / 3 for name, values in report["trained"].items()}
    assert all(len(values) == 3 for values in report["trained"].values())
    best = trained.pop("proposal")
    assert all(best < loss for loss in trained.values()), (weights, best, trained)
    # What was foretold came, to within half of what the proxies differ by.
    (fit,) = report["fits"].values()
    assert abs(report["foretold"]["proposal"]["loss"] - best) < 0.5 * fit["spread"] and fit["rank"] > 0.8


SEARCH = ("sklearn.gaussian_process", "sklearn.linear_model", "sklearn.model_selection", "sklearn.pipeline")


@pytest.mark.slow
def test_a_killed_search_ends_with_the_same_bytes(sources_file, tmp_path):
    command = ["mix", str(sources_file), "--recipe", str(RECIPE), "--proxies", "5", "--steps", "1", "--output", OUTPUT]
    check_killed_step(command, tmp_path, kills=20, preload=("open_qwen2vl.mixing.search", "scipy.stats", *SEARCH))


DEADLY = """
import os, pathlib, runpy, signal, sys
if "proxies/0001-" in sys.argv[1] and not pathlib.Path({marker!r}).exists():
    pathlib.Path({marker!r}).touch()
    os.kill(os.getpid(), signal.SIGKILL)
runpy.run_path({recipe!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_a_killed_worker_is_named_and_a_rerun_goes_on(sources_file, tmp_path, capfd):
    options = ("--proxies", 5, "--steps", 1, "--num-workers", 2)
    assert mix(sources_file, tmp_path / "whole", *options) == 0
    recipe = tmp_path / "deadly.py"
    recipe.write_text(DEADLY.format(marker=str(tmp_path / "was here"), recipe=str(RECIPE)))
    assert mix(sources_file, tmp_path / "mix", *options, "--recipe", recipe) == 2
    told = f"a worker process was killed by SIGKILL at {tmp_path / 'mix/proxies/0001-42.json'}, perhaps for want of"
    assert told in capfd.readouterr().err
    assert mix(sources_file, tmp_path / "mix", *options, "--recipe", recipe) == 0
    assert read_folder(tmp_path / "mix") == read_folder(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_workers_find_what_one_process_finds(sources_file, tmp_path, engine, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    options = ("--proxies", 5, "--steps", 1)
    assert mix(sources_file, tmp_path / "one", *options) == 0
    assert mix(sources_file, tmp_path / "two", *options, "--engine", engine, "--num-workers", 2) == 0
    assert read_folder(tmp_path / "two") == read_folder(tmp_path / "one")
