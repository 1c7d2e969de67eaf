import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from open_qwen2vl.trainer import plot_loss
from open_qwen2vl.trainer.figures.plots import smooth

HISTORY = [{"step": step, "loss": 5 / (1 + step), "learning_rate": 1e-3} for step in range(1, 40)]


def colours(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.width > 500
        return {colour for _, colour in image.convert("RGB").getcolors(maxcolors=2**20)}


def test_the_plot_is_a_whole_png_with_loss_and_learning_rate(tmp_path):
    path = tmp_path / "loss.png"
    plot_loss(HISTORY + [{"step": 40, "train_runtime": 1.0, "train_loss": 1.0}], path)
    blue, orange, gray = (31, 119, 180), (255, 127, 14), (127, 127, 127)
    assert {blue, gray} <= colours(path) and orange not in colours(path)
    plot_loss(HISTORY + [{"step": 20, "eval_loss": 1.5}, {"step": 40, "eval_loss": 1.0}], path)
    assert orange in colours(path)
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_a_history_without_losses_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no training loss"):
        plot_loss([{"step": 1, "eval_loss": 2.0}], tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_smoothing_keeps_a_constant_and_stays_within_the_losses():
    np.testing.assert_allclose(smooth(np.full(50, 3.0)), 3.0)
    noisy = np.random.default_rng(0).normal(size=300)
    assert np.abs(smooth(noisy)).max() <= np.abs(noisy).max() and smooth(noisy).std() < noisy.std() / 2


def test_scores_have_a_panel_and_sources_a_line_each(tmp_path):
    orange, green, red = (255, 127, 14), (44, 160, 44), (214, 39, 40)
    losses = {"eval_loss": 1.5, "eval_loss/cats": 1.4, "eval_loss/dogs": 1.7}
    plot_loss(HISTORY + [{"step": step, **losses} for step in (20, 39)], tmp_path / "sources.png")
    assert {orange, green, red} <= colours(tmp_path / "sources.png")
    scores = {"eval_pope_f1": 80.0, "eval_mmstar_average": 40.0, "eval_tasks_seconds": 3.0}
    plot_loss(HISTORY + [{"step": step, **scores} for step in (20, 39)], tmp_path / "scores.png")
    assert orange in colours(tmp_path / "scores.png") and green not in colours(tmp_path / "scores.png")
    plot_loss(HISTORY + [{"step": 20, "eval_tasks_seconds": 3.0}], tmp_path / "failed.png")
    assert orange not in colours(tmp_path / "failed.png"), "every task failed"


def test_a_constant_zero_is_drawn_on_a_scale_that_means_something(tmp_path, monkeypatch):
    limits = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (limits.extend(x.get_ylim() for x in self.axes), save(self, *a, **k))
    )
    scores = [{"step": step, "eval_pope_f1": 0.0, "eval_tasks_seconds": 3.0} for step in (20, 39)]
    plot_loss(HISTORY + scores, tmp_path / "loss.png")
    assert limits[1] == (0, 1) and limits[0] != (0, 1)
