"""Boxes through a crop."""

from hypothesis import given
from hypothesis import strategies as st

from open_qwen2vl.grounding import Box, crop_boxes

at = st.floats(0, 100)


@given(x=at, y=at, width=st.floats(0.5, 50), height=st.floats(0.5, 50), window=st.tuples(at, at, at, at))
def test_a_box_is_kept_by_half_of_its_area(x, y, width, height, window):
    """Inside of the window, and where it was; a box by itself is the same as among others."""
    (left, right), (top, bottom) = sorted(window[::2]), sorted(window[1::2])
    box = Box("a", (x, y, x + width, y + height))
    found = crop_boxes([box], (left, top, right, bottom))
    shared = max(0, min(x + width, right) - max(x, left)) * max(0, min(y + height, bottom) - max(y, top))
    assert len(found) == (shared >= (box.box[2] - x) * (box.box[3] - y) / 2 > 0)
    for label, (x1, y1, x2, y2) in found:
        assert label == "a" and 0 <= x1 < x2 <= right - left and 0 <= y1 < y2 <= bottom - top
        assert abs(x1 + left - max(x, left)) < 1e-9 and abs(y2 + top - min(y + height, bottom)) < 1e-9


def test_order_and_the_edge():
    boxes = [Box(str(n), (n, 0, n + 2, 2)) for n in (0, 1, 4, 9, 10)]
    assert crop_boxes(boxes, (1, 0, 10, 10)) == [
        Box("0", (0, 0, 1, 2)), Box("1", (0, 0, 2, 2)), Box("4", (3, 0, 5, 2)), Box("9", (8, 0, 9, 2))
    ]  # fmt: skip
