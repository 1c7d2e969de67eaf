"""recipes/qwen2_vl/agent: the world and its search, and the whole chain on a few boards."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.fork_server import forked_programs

ROOT = Path(__file__).parents[2]


def test_whole_chain(tmp_path, tmp_path_factory):
    """What `sh recipes/qwen2_vl/agent/run.sh` runs, with a handful of steps, in one process."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    command = ["sh", "recipes/qwen2_vl/agent/run.sh", "--max_steps", "2", "--logging_steps", "1"]
    with forked_programs(tmp_path_factory.mktemp("bin")) as path:
        environment = {**os.environ, "PATH": path, "BOARDS": "30", "HELD_OUT": "2"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs/qwen2_vl/agent"
    plan = json.loads((folder / "packs/plan.json").read_text())
    assert plan["totals"]["documents"] == 30 and not plan["totals"]["skipped"]
    assert json.loads((folder / "captions/train_results.json").read_text())["steps"] == 2
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [row["boards"] for row in metrics.values()] == [2] * 4
    assert [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")] == [
        "| who", *(f"| {name}" for name in metrics)
    ]  # fmt: skip


@pytest.fixture
def world(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes/qwen2_vl/agent"))
    import world

    return world


def test_the_search_finds_everything_from_everywhere_by_what_is_seen(world):
    squares = (*world.NAMES, "nothing")
    longest = 0
    for start in ((column, row) for column in range(3) for row in range(3)):
        for target in world.NAMES:
            board = world.Board(squares, start, target)
            here, last, steps = world.World(board, seed=0), None, 1
            while not here.is_solved:
                last = world.search_step(here.walls, last)
                here.move(last)  # a ToolError where the board ends
                steps += 1
            longest = max(longest, steps)
    assert longest <= world.MAX_STEPS


def test_held_out_boards_are_others_and_a_square_shows_what_lies_there(world):
    training = world.boards(200, 0)
    assert len(set(training)) == 200 and world.boards(200, 0) == training
    assert not set(world.boards(200, 1, frozenset(training))) & set(training)
    assert world.boards(200, 0, frozenset(training[:1]))[0] == training[1]
    board = world.Board(("cat", *(name for name in world.NAMES if name != "cat"), "nothing"), (0, 0), "fish")
    cat = world.World(board, seed=0)
    seen = cat.observe()
    assert cat.here == "cat" and cat.walls == ["up", "left"]
    assert seen.getpixel((40, 2)) == seen.getpixel((2, 40)) == (0, 0, 0) and seen.getpixel((40, 61)) == (255, 255, 255)
    assert world.World(board, seed=0, blanked=True).observe().getcolors() == [(64 * 64, (127, 127, 127))]
    with pytest.raises(world.ToolError):
        cat.move("up")
    cat.move("right")
    assert cat.here == "dog" and not cat.is_solved and cat.observe().tobytes() != seen.tobytes()
