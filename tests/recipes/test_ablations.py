"""recipes/qwen2_vl/ablations.py: every study with a handful of pictures and one step."""

import io
import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageSequence

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ablations(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "qwen2_vl"))
    import ablations

    monkeypatch.setattr(ablations, "HELD_OUT", 12)
    return ablations


@pytest.mark.parametrize(
    "name",
    ["mrope", "isolation", "fps", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dynamic", "tokens"))],
)
def test_two_arms_on_the_same_pictures_from_the_same_weights(ablations, name, tmp_path, monkeypatch):
    seen, run = {}, ablations.small_model

    def remember(study, folder, *others):
        model, processor = run(study, folder, *others)
        seen[folder.name] = {key: weight.clone() for key, weight in model.state_dict().items()}
        return model, processor

    monkeypatch.setattr(ablations, "small_model", remember)
    options = Namespace(output=tmp_path, seeds=1, steps=1, pictures=12)
    rows = ablations.run_study(name, options)
    assert list(rows) == list(ablations.STUDIES[name].arms) and all(len(found) == 1 for found in rows.values())
    assert all(0 <= row["right"] <= 1 and row["loss"] > 0 for (row,) in rows.values())
    assert seen["0"].keys() == seen["1"].keys()
    assert all(torch.equal(weight, seen["1"][key]) for key, weight in seen["0"].items())
    first, second = (row["positions"] for (row,) in rows.values())
    more = {"tokens": 65, "fps": -18}
    assert second - first == pytest.approx(more.get(name, 0), abs=3)
    # A second call takes what is there.
    monkeypatch.delattr(ablations, "run")
    assert ablations.run_study(name, options) == rows
    table = ablations.table(rows).splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {arm}" for arm in rows] and len(table) == 4


def test_what_the_scenes_show(ablations):
    """The quarter that is named is where the drawing is; a clip of equal frames would be written as fewer."""
    red = Image.new("RGB", (96, 96), "red")
    for seed in range(20):
        canvas, place = ablations.compose(red, random.Random(seed))
        left, top, right, bottom = Image.eval(canvas.getchannel("G"), lambda value: 255 - value).getbbox()
        rows = "bottom" if top + bottom > canvas.height else "top"
        assert place == f"{rows} {'right' if left + right > canvas.width else 'left'}"
    data, name = ablations.flashed({"square": red}, random.Random(0))
    with Image.open(io.BytesIO(data)) as clip:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(clip)]
    # Below the bar that shows the time.
    shown = [frame.crop((0, 5, 48, 48)).getcolors() != [(48 * 43, (255, 255, 255))] for frame in frames]
    assert name == "square" and len(frames) == 16 and 2 <= sum(shown) <= 4


def test_a_run_that_is_stopped_is_no_result(ablations, tmp_path, monkeypatch):
    """The trainer ends in good order when it is asked to stop, after as many steps as it likes."""
    monkeypatch.setattr(ablations.PackedTrainer, "train", lambda self: None)
    with pytest.raises(SystemExit, match="stopped at step 0"):
        ablations.run_study("mrope", Namespace(output=tmp_path, seeds=1, steps=1, pictures=12))
    assert not (tmp_path / "mrope" / "0" / "0.json").exists()
