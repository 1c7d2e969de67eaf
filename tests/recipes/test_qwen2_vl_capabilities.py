"""recipes/qwen2_vl/capabilities: clips that move as they say, and its whole chain on a handful of files."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText

from tests.fork_server import forked_programs

pytest.importorskip("av")
ROOT = Path(__file__).parents[2]
FOLDER = "recipes/qwen2_vl/capabilities"


def test_whole_chain(tmp_path, tmp_path_factory):
    """What `sh recipes/qwen2_vl/capabilities/run.sh` runs, with a handful of files and steps."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    command = ["sh", f"{FOLDER}/run.sh", "--max_steps", "2", "--logging_steps", "1"]
    with forked_programs(tmp_path_factory.mktemp("bin")) as path:
        environment = {**os.environ, "PATH": path, "FILES": "24"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs/qwen2_vl/capabilities"
    tasks = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert tasks == ["| task", "| name (canvases)", "| box (canvases)", "| name (clips)", "| direction (clips)"]
    totals = json.loads((run / "packs/plan.json").read_text())["totals"]
    assert totals["samples"] == totals["documents"] == 48 and not totals["skipped"]
    names, boxes, _, directions = json.loads((run / "metrics.json").read_text())["rows"]
    assert names["asked"] == boxes["asked"] == directions["asked"] == 24
    assert names["baseline"] == pytest.approx(1 / 12) and directions["baseline"] == 0.25
    # One box for all canvases is right somewhere, and a model of two steps is not.
    assert boxes["share"] == 0 < boxes["baseline"] < 0.6
    assert type(AutoModelForImageTextToText.from_pretrained(run / "model")).__name__.endswith("Generation")


@pytest.mark.parametrize("seed", range(6))
def test_a_clip_moves_as_it_says_and_holds_the_frames_that_are_looked_at(seed, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / FOLDER))
    # Another recipe's, if its test has run before.
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    import build_clips
    import evaluate

    made = build_clips.clip(random.Random(seed), build_clips.sprites())
    frames = evaluate.read_frames("video", made.data).astype(int)
    assert len(frames) == 4
    moves = {}
    for name, axis in (("right", 2), ("down", 1)):
        for sign, direction in ((1, name), (-1, {"right": "left", "down": "up"}[name])):
            # A frame that is rolled the way that the clip goes is the next one.
            errors = [np.abs(np.roll(frames[:-1], sign * by, axis) - frames[1:]).mean() for by in range(4, 12)]
            moves[direction] = min(errors)
    assert min(moves, key=moves.get) == made.answers["direction"]["text"]


def test_boxes_hold_their_emoji(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / FOLDER))
    # Another recipe's, if its test has run before.
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    import build_clips
    import evaluate

    made = build_clips.canvas(random.Random(0), build_clips.sprites())
    drawn = (evaluate.read_frames("image", made.data)[0] < 200).any(-1)
    left, top, right, bottom = made.answers["box"]["box"]
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    assert abs(rows[[0, -1]] - [top, bottom - 1]).max() <= 1 and abs(columns[[0, -1]] - [left, right - 1]).max() <= 1
    question = evaluate.Question("image", "box", np.zeros((1, 50, 100, 3), np.uint8), {"box": [0, 0, 50, 50]})
    assert evaluate.with_box(question, np.array([0, 0, 0.5, 1])).iou == pytest.approx(1)
    assert not evaluate.with_box(question, np.array([0, 0, 0.2, 1])).right
    assert evaluate.interval(50, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
