"""IoU, accuracy and mean average precision on boxes whose values are known."""

import sys

import pytest

from open_qwen2vl.grounding import Box, accuracy_at, box_iou, mean_average_precision

SQUARE = (0.0, 0.0, 10.0, 10.0)


def test_iou_of_every_pair():
    found = box_iou([SQUARE, (5, 5, 5, 5)], [SQUARE, (5, 0, 15, 10), (20, 20, 30, 30), (5, 5, 5, 5)])
    assert found.tolist() == [[1.0, pytest.approx(1 / 3), 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert box_iou([], [SQUARE]).shape == (0, 1)


def test_accuracy_takes_the_first_answer_and_counts_none_as_wrong():
    half = Box("a", (0, 0, 10, 5))
    answers = [[Box(None, SQUARE)], [half, Box("a", SQUARE)], [], [Box("a", (20, 20, 30, 30)), half]]
    assert accuracy_at([SQUARE] * 4, answers) == 0.5
    assert accuracy_at([SQUARE] * 4, answers, threshold=0.51) == 0.25
    for truths in ([], [SQUARE]):
        with pytest.raises(ValueError, match="answers"):
            accuracy_at(truths, answers)


def test_mean_average_precision(capsys):
    truths = [[Box("cat", SQUARE), Box("dog", (20, 20, 40, 40))], [Box("cat", SQUARE)], []]
    assert mean_average_precision(truths, truths)["map"] == pytest.approx(1)
    # One of two cats at IoU 0.8, which counts at 7 of the 10 thresholds; the dog is called a cow.
    answers = [[Box("cow", (20, 20, 40, 40))], [Box("cat", (0, 0, 10, 8))], []]
    found = mean_average_precision(truths, answers)
    half = 51 / 101  # recall 0.5 at the 101 points of COCO's curve
    assert found["map_50"] == pytest.approx(half / 2, abs=1e-3)
    assert found["map"] == pytest.approx(0.7 * half / 2, abs=1e-3)
    assert mean_average_precision(truths, [[], [], []]) == {"map": 0.0, "map_50": 0.0, "map_75": 0.0}
    with pytest.raises(ValueError, match="no true box"):
        mean_average_precision([[]], [[]])
    assert capsys.readouterr().out == ""


def test_without_pycocotools_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ImportError, match=r"open-qwen2vl\[grounding\]"):
        mean_average_precision([[Box("a", SQUARE)]], [[]])
