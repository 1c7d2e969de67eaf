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
        environment = {**os.environ, "PATH": path, "EMOJI": "30"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / "qwen2_vl"
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table] == ["| run", "| dynamic", "| fixed"]
    held_out = json.loads((folder / "data/corpus.json").read_text())["held_out"]
    assert len(sizes(folder / "data/held-out.tar")) > held_out / 2
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


def test_a_corpus_of_other_options_and_a_run_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "qwen2_vl"))
    import build_model
    import build_pictures
    import compare

    (tmp_path / "corpus.json").write_text(json.dumps({"options": {"seed": 1}}))
    with pytest.raises(ValueError, match="was made with .*delete it or name another"):
        build_pictures.build(tmp_path, seed=0)
    with pytest.raises(ValueError, match="run build_pictures.py first"):
        build_model.build(tmp_path, tmp_path / "init")
    with tarfile.open(tmp_path / "held-out.tar", "w"):
        pass
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "run"), "--data", str(tmp_path)])
    with pytest.raises(SystemExit):
        compare.main()
    assert "holds no finished training" in capsys.readouterr().err
